// A CUDA runtime without a GPU: it has memory of its own, computes nothing and remembers everything. check_cuda.py builds it as
// libcudart, libcublas and the others that onnxruntime's CUDA provider loads, so that the provider itself decides, without a GPU, which
// operators it takes, what it copies, what it captures and what it says when memory is short.
//
// Memory of the device is mapped twice: unreadable at the address that programs get, so that whatever reaches there from the host is
// killed as on a machine with a GPU, and readable for the copies made here. Kernels leave memory as it was, zeros at first; `reads` says
// what copies of one size to the host shall find instead, for the few values a graph goes on with on the host.
//
// Written against the documented interface (CUDA Runtime API, CUDA C++ Programming Guide). Functions without effect here are not in this
// file: check_cuda.py adds them, as ones that return 0.

#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

struct Block {
  char* at;
  char* readable;
  size_t size;
};

// What a graph holds: how many kernels, copies and fills; and the memory of the host that it reads at every replay, as it was.
struct Graph {
  int size = 0;
  std::vector<std::pair<const void*, std::string>> host;
};

struct Recorder {
  std::recursive_mutex lock;
  std::map<char*, Block> device;
  std::map<const void*, size_t> pinned;  // of the host, for copies; address → size
  std::map<const void*, std::string> kernels;  // the function that launches one → its name
  std::map<size_t, unsigned long long> reads;
  std::string log;
  bool quiet = false;  // nothing is remembered: for the time that the host takes
  size_t total = 80ull << 30, used = 0, peak = 0;
  bool capturing = false;
  Graph graph;  // that is being captured
  cudaError_t last = cudaSuccess;
};

Recorder& recorder() {  // never destroyed: the provider's own destructors come later
  static Recorder* one = new Recorder;
  return *one;
}

using Guard = std::lock_guard<std::recursive_mutex>;

void say(const std::string& line) {
  if (recorder().quiet) return;
  Guard guard(recorder().lock);
  recorder().log += line + "\n";
}

cudaError_t failed(cudaError_t error) { return recorder().last = error; }

// Work on a stream: done now, or put into the graph that is being captured.
void work(const std::string& what) {
  Recorder& r = recorder();
  r.graph.size += r.capturing;
  say((r.capturing ? "capture " : "run ") + what);
}

// What CUDA refuses while a stream is captured ("Prohibited and Unhandled Operations").
bool prohibited(const char* name) {
  if (!recorder().capturing) return false;
  say(std::string("prohibited ") + name);
  failed(cudaErrorStreamCaptureUnsupported);
  return true;
}

Block* block_of(const void* address) {
  auto& device = recorder().device;
  auto next = device.upper_bound((char*)address);
  if (next == device.begin()) return nullptr;
  Block& block = std::prev(next)->second;
  return (char*)address < block.at + block.size ? &block : nullptr;
}

char* readable(const void* address) {
  Block* block = block_of(address);
  return block ? block->readable + ((char*)address - block->at) : (char*)address;
}

bool is_pinned(const void* address) {
  auto& pinned = recorder().pinned;
  auto next = pinned.upper_bound(address);
  return next != pinned.begin() && (const char*)address < (const char*)std::prev(next)->first + std::prev(next)->second;
}

cudaError_t allocate(void** address, size_t size) {
  Recorder& r = recorder();
  Guard guard(r.lock);
  if (prohibited("cudaMalloc")) return r.last;
  if (r.used + size > r.total) {
    say("refused " + std::to_string(size));
    return failed(cudaErrorMemoryAllocation);
  }
  size_t pages = (size / 4096 + 1) * 4096;
  int file = memfd_create("device", 0);
  if (file < 0 || ftruncate(file, (off_t)pages)) return failed(cudaErrorMemoryAllocation);
  char* at = (char*)mmap(nullptr, pages, PROT_NONE, MAP_SHARED, file, 0);
  char* seen = (char*)mmap(nullptr, pages, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  r.device[at] = {at, seen, pages};
  r.used += pages;
  if (r.used > r.peak) r.peak = r.used;
  *address = at;
  say("malloc " + std::to_string(size));
  return cudaSuccess;
}

cudaError_t release(void* address) {
  Recorder& r = recorder();
  Guard guard(r.lock);
  auto found = r.device.find((char*)address);
  if (found == r.device.end()) return address ? failed(cudaErrorInvalidValue) : cudaSuccess;
  munmap(found->second.at, found->second.size);
  munmap(found->second.readable, found->second.size);
  r.used -= found->second.size;
  r.device.erase(found);
  say("free");
  return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, size_t size) {
  Recorder& r = recorder();
  Guard guard(r.lock);
  bool here = !block_of(to), from_here = !block_of(from);
  bool pageable = (here && !is_pinned(to)) || (from_here && !is_pinned(from));
  const char* way = here && from_here ? "host" : here ? "to-host" : from_here ? "to-device" : "within";
  if (r.quiet)
    r.graph.size += r.capturing;
  else
    work(std::string("copy ") + way + (here != from_here && pageable ? "-pageable " : " ") + std::to_string(size));
  if (r.capturing) {
    if (from_here) r.graph.host.emplace_back(from, std::string((const char*)from, size));
    return cudaSuccess;
  }
  if (r.quiet && !here && !from_here) return cudaSuccess;  // the device takes no time
  memmove(readable(to), readable(from), size);
  auto value = r.reads.find(size);
  if (here && !from_here && value != r.reads.end()) memcpy(to, &value->second, size < 8 ? size : 8);
  return cudaSuccess;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block) {
  Recorder& r = recorder();
  if (r.quiet) return r.graph.size += r.capturing, cudaSuccess;
  Guard guard(r.lock);
  auto found = r.kernels.find(function);
  std::string name = "?";
  if (found != r.kernels.end()) {
    int status = 0;
    char* plain = abi::__cxa_demangle(found->second.c_str(), nullptr, nullptr, &status);
    name = status ? found->second : plain;
    free(plain);
  }
  char size[96];
  snprintf(size, sizeof size, "kernel %ux%ux%u %ux%ux%u ", grid.x, grid.y, grid.z, block.x, block.y, block.z);
  work(size + name);
  return cudaSuccess;
}

int product(const char* name, int m, int n, int k, int count = 1) {
  if (recorder().quiet) return recorder().graph.size += recorder().capturing, 0;
  char line[128];
  snprintf(line, sizeof line, "kernel %s %dx%dx%d x%d", name, m, n, k, count);
  work(line);
  return 0;
}

template <typename T>
cudaError_t handle(T* made) {  // something to hold that is never looked into
  *made = (T)malloc(64);
  return cudaSuccess;
}

}  // namespace

// ---------------------------------------------------------------------------------------------- for check_cuda.py

// What happened since the last call, a line each; valid until the next.
API const char* recorder_take() {
  static std::string taken;
  Guard guard(recorder().lock);
  taken.swap(recorder().log);
  recorder().log.clear();
  return taken.c_str();
}
API void recorder_set_quiet(bool quiet) { recorder().quiet = quiet; }
API void recorder_set_memory(size_t bytes) { recorder().total = bytes; }
API size_t recorder_peak_memory() { return recorder().peak; }
API void recorder_reads(size_t bytes, unsigned long long value) { recorder().reads[bytes] = value; }

// ---------------------------------------------------------------------------------------------- device

API cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaPeekAtLastError() { return recorder().last; }
API cudaError_t cudaGetLastError() {
  cudaError_t error = recorder().last;
  recorder().last = cudaSuccess;
  return error;
}
API const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorOther";
}
API const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorMemoryAllocation) return "out of memory";
  return error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing" : "another error";
}
// A Hopper card (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", 9.0).
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "a recorder");
  p->major = 9;
  p->totalGlobalMem = recorder().total;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->reservedSharedMemPerBlock = 1 << 10;
  p->totalConstMem = 64 << 10;
  p->l2CacheSize = 50 << 20;
  p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = p->memoryPoolsSupported = 1;
  p->asyncEngineCount = 3;
  for (int axis = 0; axis < 3; axis++) {
    p->maxThreadsDim[axis] = axis == 2 ? 64 : 1024;
    p->maxGridSize[axis] = axis ? 65535 : 2147483647;
  }
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, 0);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0; say("attribute " + std::to_string((int)attribute));
  }
  return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPointByVersion(
    const char*, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* found) {
  *function = nullptr;
  if (found) *found = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------- memory and copies

API cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  *total = recorder().total;
  *left = *total - recorder().used;
  return cudaSuccess;
}
API cudaError_t cudaMalloc(void** address, size_t size) { return allocate(address, size); }
API cudaError_t cudaMallocFromPoolAsync(void** address, size_t size, cudaMemPool_t, cudaStream_t) { return allocate(address, size); }
API cudaError_t cudaFree(void* address) { return release(address); }
API cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return release(address); }
API cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) { return handle(pool); }
API cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  Guard guard(recorder().lock);
  *address = aligned_alloc(4096, (size / 4096 + 1) * 4096);
  recorder().pinned[*address] = size;
  return cudaSuccess;
}
API cudaError_t cudaMallocHost(void** address, size_t size) { return cudaHostAlloc(address, size, 0); }
API cudaError_t cudaFreeHost(void* address) {
  Guard guard(recorder().lock);
  recorder().pinned.erase(address);
  free(address);
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
  Guard guard(recorder().lock);
  memset(found, 0, sizeof *found);
  bool ours = block_of(address);
  found->type = ours ? cudaMemoryTypeDevice : is_pinned(address) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  found->devicePointer = (void*)address;
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  return prohibited("cudaMemcpy") ? recorder().last : copy(to, from, size);
}
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) { return copy(to, from, size); }
API cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  Guard guard(recorder().lock);
  work("copy within " + std::to_string(width * height));
  for (size_t row = 0; row < height && !recorder().capturing && !recorder().quiet; row++)
    memmove(readable(to) + row * to_pitch, readable(from) + row * from_pitch, width);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyFromSymbol(void* to, const void*, size_t size, size_t, cudaMemcpyKind) {  // constants of kernels: 0
  return memset(readable(to), 0, size), cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* at, int value, size_t size, cudaStream_t) {
  Guard guard(recorder().lock);
  work("fill " + std::to_string(size));
  if (!recorder().capturing && !recorder().quiet) memset(readable(at), value, size);
  return cudaSuccess;
}
API cudaError_t cudaMemset(void* at, int value, size_t size) {
  return prohibited("cudaMemset") ? recorder().last : cudaMemsetAsync(at, value, size, nullptr);
}

// ---------------------------------------------------------------------------------------------- streams and graphs

API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return handle(stream); }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return handle(stream); }
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return handle(event); }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return handle(event); }
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 0.01f, cudaSuccess; }
static cudaError_t waited(const char* name) {
  if (prohibited(name)) return recorder().last;
  say("wait");
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() { return waited("cudaDeviceSynchronize"); }
API cudaError_t cudaStreamSynchronize(cudaStream_t) { return waited("cudaStreamSynchronize"); }
API cudaError_t cudaEventSynchronize(cudaEvent_t) { return waited("cudaEventSynchronize"); }
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  work("host");
  if (!recorder().capturing) function(data);
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = recorder().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  recorder().graph = Graph();
  recorder().capturing = true;
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  recorder().capturing = false;
  *graph = (cudaGraph_t) new Graph(recorder().graph);
  say("captured " + std::to_string(recorder().graph.size));
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = (cudaGraphExec_t) new Graph(*(Graph*)graph);
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  say("replay " + std::to_string(((Graph*)graph)->size));
  for (auto& [address, bytes] : ((Graph*)graph)->host)  // if it was freed to the system, this crashes, as it should
    if (memcmp(address, bytes.data(), bytes.size())) say("stale " + std::to_string(bytes.size()));
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------- kernels

API void** __cudaRegisterFatBinary(void*) {
  static void* one;
  return &one;
}
API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
  Guard guard(recorder().lock);
  recorder().kernels[function] = name;
}
static thread_local struct { dim3 grid, block; size_t shared; void* stream; } pushed;  // by kernel<<<…>>>, popped by its launcher
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(void**)stream = pushed.stream;
  return cudaSuccess;
}
#if CUDART_VERSION >= 13000
API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) { return *kernel = (cudaKernel_t)function, cudaSuccess; }
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t) {
  return launch((const void*)kernel, grid, block);
}
#endif
API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t, cudaStream_t) {
  return launch(function, grid, block);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void**, size_t, cudaStream_t) {
  return launch(function, grid, block);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return launch(function, config->gridDim, config->blockDim);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}

// ---------------------------------------------------------------------------------------------- cuDNN

API int cudnnCreate(void** made) { return handle(made); }
API const char* cudnnGetErrorString(int) { return "another status"; }
API size_t cudnnGetVersion() { return 91000; }
API int cudnnCreateTensorDescriptor(void** made) { return handle(made); }
API int cudnnCreateReduceTensorDescriptor(void** made) { return handle(made); }
API int cudnnGetReductionIndicesSize(void*, void*, void*, void*, size_t* bytes) { return *bytes = 0, 0; }
API int cudnnGetReductionWorkspaceSize(void*, void*, void*, void*, size_t* bytes) { return *bytes = 0, 0; }
API int cudnnReduceTensor() { return work("kernel cudnnReduceTensor"), 0; }

// ---------------------------------------------------------------------------------------------- cuBLAS: a kernel for each product

API int cublasCreate_v2(void** made) { return handle(made); }
API int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
API const char* cublasGetStatusName(int) { return "CUBLAS_STATUS_OTHER"; }
API const char* cublasGetStatusString(int) { return "another status"; }
API int cublasSgemm_v2(void*, int, int, int m, int n, int k) { return product("sgemm", m, n, k); }
API int cublasGemmEx(void*, int, int, int m, int n, int k) { return product("gemm", m, n, k); }
API int cublasGemmStridedBatchedEx(
    void*, int, int, int m, int n, int k, const void*, const void*, int, int, long long, const void*, int, int, long long, const void*,
    void*, int, int, long long, int count) {
  return product("gemm", m, n, k, count);
}
API int cublasLtCreate(void** made) { return handle(made); }
API int cublasLtMatmulDescCreate(void** made, int, int) { return handle(made); }
API int cublasLtMatrixLayoutCreate(void** made, int, unsigned long long, unsigned long long, long long) { return handle(made); }
API int cublasLtMatmulPreferenceCreate(void** made) { return handle(made); }
API int cublasLtMatrixTransformDescCreate(void** made, int) { return handle(made); }
API int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int, void* results, int* count) {
  memset(results, 0, 96);  // cublasLtMatmulHeuristicResult_t: an algorithm, workspace of no bytes, status 0
  return *count = 1, 0;
}
API int cublasLtMatmul() { return work("kernel lt-matmul"), 0; }
