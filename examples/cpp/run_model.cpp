// Loads model.so with TVM's runtime only, runs it once and prints its outputs.
//
//   run_model model.so [DIMENSION=SIZE...]
//
// Integer inputs are all 1, others all 0.5; symbolic dimensions are 1 unless given. What was compiled
// for a GPU runs on the first one.

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

namespace {

constexpr size_t kAlignment = 64;  // TVM's kernels load vectors from aligned tensors
constexpr size_t kFooterBytes = 32;
constexpr char kMagic[] = "SPARSTVM";

// A compiled model mapped into memory: weights are used where they lie.
class Artifact {
 public:
  explicit Artifact(const std::string& path) {
    int file = open(path.c_str(), O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) throw std::runtime_error(path + ": cannot open");
    size_ = status.st_size;
    void* memory = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (memory == MAP_FAILED) throw std::runtime_error(path + ": cannot map");
    data_ = static_cast<char*>(memory);
    if (size_ < kFooterBytes || memcmp(data_ + size_ - 8, kMagic, 8) != 0) {
      throw std::runtime_error(path + ": not a compiled model, or truncated");
    }
    uint64_t offset, length;
    memcpy(&offset, data_ + size_ - kFooterBytes, sizeof offset);
    memcpy(&length, data_ + size_ - kFooterBytes + 8, sizeof length);
    if (offset + length + kFooterBytes != size_) throw std::runtime_error(path + ": damaged");
    manifest_ = json::Parse(ffi::String(data_ + offset, length)).cast<json::Object>();
  }

  json::Array List(const char* key) const {
    return manifest_[ffi::String(key)].cast<json::Array>();
  }
  std::string Device() const { return manifest_[ffi::String("device")].cast<ffi::String>(); }
  char* At(int64_t offset) const { return data_ + offset; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
  json::Object manifest_;
};

template <typename T>
T Field(const ffi::Any& entry, const char* key) {
  return entry.cast<json::Object>()[ffi::String(key)].cast<T>();
}

// Memory that belongs to somebody else, in the shape TVM takes.
struct Borrowed {
  void* data;
  void AllocData(DLTensor* tensor) { tensor->data = data; }
  void FreeData(DLTensor*) {}
};

struct Allocated {
  void AllocData(DLTensor* tensor) {
    size_t bytes = std::max<size_t>(ffi::GetDataSize(*tensor), 1);
    size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    tensor->data = std::aligned_alloc(kAlignment, rounded);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

constexpr DLDevice kCPU{kDLCPU, 0};

// TVM's part for CUDA, which registers itself, and before it the CUDA runtime that it links.
void LoadCuda() {
  for (const char* name : {"libcudart.so.13", "libtvm_runtime_cuda.so"}) {
    if (!dlopen(name, RTLD_NOW | RTLD_GLOBAL)) {
      throw std::runtime_error(std::string("the model needs an NVIDIA GPU: ") + dlerror());
    }
  }
}

// A copy on another device, or the tensor itself where it is there.
ffi::Tensor On(DLDevice device, const ffi::Tensor& tensor) {
  if (tensor.device().device_type == device.device_type) return tensor;
  static const ffi::Function allocate =
      ffi::Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
  static const ffi::Function copy = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyFromTo");
  ffi::Shape shape(tensor.shape().begin(), tensor.shape().end());
  ffi::Tensor there = allocate(shape, tensor.dtype(), device, nullptr).cast<ffi::Tensor>();
  copy(tensor, there);  // after the kernels before it, as both are in the default stream
  return there;
}

ffi::Array<ffi::Tensor> Weights(const Artifact& artifact, DLDevice device) {
  ffi::Array<ffi::Tensor> weights;
  for (const ffi::Any& entry : artifact.List("weights")) {
    std::vector<int64_t> shape;
    for (const ffi::Any& dim : Field<json::Array>(entry, "shape")) {
      shape.push_back(dim.cast<int64_t>());
    }
    Borrowed memory{artifact.At(Field<int64_t>(entry, "offset"))};
    DLDataType dtype = ffi::StringToDLDataType(Field<ffi::String>(entry, "dtype"));
    ffi::ShapeView view(shape.data(), shape.size());
    weights.push_back(On(device, ffi::Tensor::FromNDAlloc(memory, view, dtype, kCPU)));
  }
  return weights;
}

ffi::Tensor Input(const ffi::Any& entry, const std::map<std::string, int64_t>& sizes) {
  std::vector<int64_t> shape;
  for (const ffi::Any& dim : Field<json::Array>(entry, "shape")) {
    if (auto size = dim.as<int64_t>()) {
      shape.push_back(*size);
    } else {
      auto given = sizes.find(dim.cast<ffi::String>());
      shape.push_back(given == sizes.end() ? 1 : given->second);
    }
  }
  DLDataType dtype = ffi::StringToDLDataType(Field<ffi::String>(entry, "dtype"));
  ffi::ShapeView view(shape.data(), shape.size());
  ffi::Tensor input = ffi::Tensor::FromNDAlloc(Allocated(), view, dtype, kCPU);
  int64_t count = input.numel();
  if (dtype.code == kDLFloat && dtype.bits == 32) {
    std::fill_n(static_cast<float*>(input.data_ptr()), count, 0.5f);
  } else if (dtype.code == kDLInt && dtype.bits == 64) {
    std::fill_n(static_cast<int64_t*>(input.data_ptr()), count, 1);
  } else if (dtype.code == kDLInt && dtype.bits == 32) {
    std::fill_n(static_cast<int32_t*>(input.data_ptr()), count, 1);
  } else {
    throw std::runtime_error("this example fills float32, int64 and int32 inputs only");
  }
  return input;
}

void Print(const std::string& name, const ffi::Tensor& output) {
  std::cout << name << " [";
  for (int64_t i = 0; i < output.ndim(); ++i) std::cout << (i ? ", " : "") << output.size(i);
  std::cout << "]:";
  for (int64_t i = 0; i < std::min<int64_t>(output.numel(), 4); ++i) {
    if (output.dtype().code == kDLFloat) {
      std::cout << " " << static_cast<const float*>(output.data_ptr())[i];
    } else {
      std::cout << " " << static_cast<const int64_t*>(output.data_ptr())[i];
    }
  }
  std::cout << " ...\n";
}

int Run(int argc, char** argv) {
  if (argc < 2) throw std::runtime_error("usage: run_model MODEL.so [DIMENSION=SIZE...]");
  std::map<std::string, int64_t> sizes;
  for (int i = 2; i < argc; ++i) {
    std::string option = argv[i];
    size_t equals = option.find('=');
    if (equals == std::string::npos) throw std::runtime_error(option + ": not DIMENSION=SIZE");
    sizes[option.substr(0, equals)] = std::stoll(option.substr(equals + 1));
  }
  Artifact artifact(argv[1]);
  const bool on_gpu = artifact.Device() == "cuda";
  const DLDevice device{on_gpu ? kDLCUDA : kDLCPU, 0};
  if (on_gpu) LoadCuda();

  // The code: an ELF library whose one function makes a virtual machine for the program.
  // By its whole path, as a bare name would be looked up where the system's libraries are.
  ffi::Module library = ffi::Module::LoadFromFile(std::filesystem::absolute(argv[1]).string());
  ffi::Module machine = (*library->GetFunction("vm_load_executable"))().cast<ffi::Module>();
  constexpr int kDeviceId = 0, kPooledAllocator = 2;
  ffi::Function initialize = *machine->GetFunction("vm_initialization");
  const int host = kDLCPU;
  if (on_gpu) {  // shapes are computed on the host all the same
    const int gpu = kDLCUDA;
    initialize(gpu, kDeviceId, kPooledAllocator, host, kDeviceId, kPooledAllocator);
  } else {
    initialize(host, kDeviceId, kPooledAllocator);
  }
  ffi::Function main = *machine->GetFunction("main");

  // The program takes the inputs in order, and all weights as one last argument.
  std::vector<ffi::Any> owned;
  for (const ffi::Any& entry : artifact.List("inputs")) {
    owned.push_back(On(device, Input(entry, sizes)));
  }
  owned.push_back(Weights(artifact, device));
  std::vector<ffi::AnyView> arguments(owned.begin(), owned.end());
  ffi::Any result;
  main.CallPacked(ffi::PackedArgs(arguments.data(), arguments.size()), &result);

  json::Array outputs = artifact.List("outputs");
  for (size_t i = 0; i < outputs.size(); ++i) {
    auto one = result.as<ffi::Tensor>();
    ffi::Tensor output = one ? *one : result.cast<ffi::Array<ffi::Tensor>>()[i];
    Print(Field<ffi::String>(outputs[i], "name"), On(kCPU, output));
  }
  return 0;
}

}  // namespace

// Linux lets a process use AMX's tiles only after asking. Where there are none it says no, and no
// model needs them.
void AllowAmx() {
#ifdef __x86_64__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  syscall(SYS_arch_prctl, kRequestPermission, kTileData);
#endif
}

int main(int argc, char** argv) {
  AllowAmx();
  try {
    return Run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
