"""``sparse-tvm doctor``: what is here, and what of it makes things slow."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show CPU, caches, target, linkers and versions, and what would be slow here."""
    import json

    from rich.text import Text

    from sparse_tvm.cli.console import stdout_console
    from sparse_tvm.diagnosis import diagnose
    from sparse_tvm.report.tables import fact_table

    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = stdout_console()
    packages = [f"{name} {version or 'missing'}" for name, version in found["packages"].items()]
    console.print(
        fact_table(
            [
                ("CPU", f"{found['cpu']} ({found['architecture']})"),
                ("Cores", str(found["cores"])),
                ("Features", " ".join(found["features"])),
                ("Caches", ", ".join(f"{n} {size}" for n, size in found["caches"].items())),
                ("Native target", found["target"] or "none"),
                ("Linkers", ", ".join(found["linkers"]) or "none"),
                ("Emulators", ", ".join(found["emulators"]) or "none"),
                ("Python", found["python"]),
                ("Packages", ", ".join(packages)),
            ]
        )
    )
    for problem in found["problems"]:
        console.print(Text.assemble(("warning: ", "bold yellow"), problem))
