"""Who may ask for what: control, tokens, other sites' pages, TLS."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gevent")  # of the extra for tests, beyond the server's own
pytest.importorskip("uvicorn")

import grpc
from serving_fixtures import infer_body, write_encoder
from tritonclient.grpc import service_pb2 as pb

from sparse_tvm.cli import main
from sparse_tvm.errors import OptionError
from sparse_tvm.serving.access import is_loopback
from sparse_tvm.serving.local import LocalServer, serving
from sparse_tvm.serving.options import Options

BODY = json.dumps(infer_body(np.array([[1, 2]]))).encode()
INFER = "/v2/models/encoder/infer"
UNLOAD = "/v2/repository/models/encoder/unload"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "encoder.so")


def status(
    server: LocalServer,
    path: str,
    body: bytes | None = None,
    *,
    context: Any = None,
    **headers: str,
) -> int:
    scheme = "http" if context is None else "https"
    request = urllib.request.Request(f"{scheme}://127.0.0.1:{server.http}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=20, context=context) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def code(
    server: LocalServer, method: str, request: Any, credentials: Any = None, **meta: str
) -> str:
    target = f"127.0.0.1:{server.grpc}"
    channel = (
        grpc.insecure_channel(target)
        if credentials is None
        else grpc.secure_channel(target, credentials)
    )
    with channel:
        stub = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        try:
            stub(request.SerializeToString(), timeout=20, metadata=tuple(meta.items()))
        except grpc.RpcError as error:
            return error.code().name
        return "OK"


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_which_hosts_only_this_machine_reaches(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone


@pytest.mark.parametrize("options", [["--no-allow-control"], ["--host", "0.0.0.0"]])
def test_models_are_not_unloaded_over_the_network(artifact: Path, options: list[str]) -> None:
    unload = pb.RepositoryModelUnloadRequest(model_name="encoder")
    with serving([artifact], *options) as server:
        assert status(server, UNLOAD, b"") == 403
        assert code(server, "RepositoryModelUnload", unload) == "PERMISSION_DENIED"
        assert status(server, INFER, BODY) == 200
    with serving([artifact], *options[:2:-1], "--allow-control") as server:
        assert status(server, UNLOAD, b"") == 200


def test_pages_of_other_sites_are_refused(artifact: Path) -> None:
    with serving([artifact], "--allow-origin", "https://good.example") as server:
        assert status(server, INFER, BODY, Origin="https://bad.example") == 403
        assert status(server, INFER, BODY, Origin=server.url) == 403
        assert status(server, "/metrics", Origin="null") == 403
        assert status(server, INFER, BODY, Origin="https://good.example") == 200
        live = pb.ServerLiveRequest()
        assert code(server, "ServerLive", live, origin="https://bad.example") == "PERMISSION_DENIED"


def test_requests_bear_a_token(artifact: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("first\n\n  second \n")
    metadata = pb.ModelMetadataRequest(name="encoder")
    with serving([artifact], "--token-file", str(tokens)) as server:
        assert status(server, "/v2/health/ready") == 200
        for path, body in ((INFER, BODY), ("/metrics", None), (UNLOAD, b""), ("/v1/models", None)):
            assert status(server, path, body) == 401
            assert status(server, path, body, Authorization="Bearer wrong") == 401
            assert status(server, path, body, Authorization="Basic first") == 401
        assert status(server, INFER, BODY, Authorization="Bearer first") == 200
        assert status(server, INFER, BODY, Authorization="bearer second") == 200
        assert code(server, "ServerReady", pb.ServerReadyRequest()) == "OK"
        assert code(server, "ModelMetadata", metadata) == "UNAUTHENTICATED"
        assert code(server, "ModelMetadata", metadata, authorization="Bearer first") == "OK"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_tls_and_certificates_of_clients(artifact: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    trusting = ssl.create_default_context(cafile=str(cert))
    roots = cert.read_bytes()
    live = pb.ServerLiveRequest()
    tls = ["--tls-cert", str(cert), "--tls-key", str(key)]
    with serving([artifact], *tls) as server:
        assert status(server, INFER, BODY, context=trusting) == 200
        assert code(server, "ServerLive", live, grpc.ssl_channel_credentials(roots)) == "OK"
        with pytest.raises(OSError, match=r"reset|closed|aborted"):
            status(server, INFER, BODY)
    with serving([artifact], *tls, "--tls-client-ca", str(cert)) as server:
        with pytest.raises(OSError, match=r"certificate required|EOF|reset|closed"):
            status(server, INFER, BODY, context=trusting)
        anonymous = grpc.ssl_channel_credentials(roots)
        assert code(server, "ServerLive", live, anonymous) == "UNAVAILABLE"
        trusting.load_cert_chain(cert, key)
        assert status(server, INFER, BODY, context=trusting) == 200
        known = grpc.ssl_channel_credentials(roots, key.read_bytes(), roots)
        assert code(server, "ServerLive", live, known) == "OK"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-cert", "{artifact}"], "both a certificate and its key"),
        (["--tls-cert", "{artifact}", "--tls-key", "{artifact}"], "cannot use the certificate"),
        (["--tls-cert", "none.pem", "--tls-key", "none.pem"], "No such file"),
        (["--tls-client-ca", "{artifact}"], "over TLS only"),
        (["--token-file", "none"], "cannot read the tokens"),
    ],
)
def test_options_that_cannot_be_given(
    artifact: Path, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    here = [option.format(artifact=artifact) for option in options]
    assert main(["serve", str(artifact), "--port", "0", "--grpc-port", "0", *here]) == 2
    errors = capfd.readouterr().err
    assert message in " ".join(errors.split())
    assert "Traceback" not in errors


@pytest.mark.parametrize("name", ["timeout", "patience", "drain", "poll"])
def test_times_that_are_none(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        Options(**{name: float("nan")})
