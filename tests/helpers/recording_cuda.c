// A libcuda that launches nothing and keeps what it is asked to launch: kernel, grid, stream, every byte of its
// parameters. Triton's own C launchers are linked against it; launch_sweep.py builds and reads it.
//
// What is loaded as a kernel's code are the sizes of its parameters: a count and as many, each a byte.

#include <cuda.h>
#include <stdint.h>
#include <string.h>

#define KERNELS 65536
#define MOST 255

static uint8_t sizes_of[KERNELS][MOST + 1];
static uintptr_t kernels;
static uint8_t kept[1 << 16];
static size_t used;

static void keep(const void* from, size_t count) {
  if (used + count <= sizeof kept) memcpy(kept + used, from, count);
  used += count;
}

// Copies what was kept since the last call; says how many bytes that was.
size_t recording_take(void* to, size_t most) {
  size_t count = used;
  memcpy(to, kept, count < most ? count : most);
  used = 0;
  return count;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (++kernels >= KERNELS) return CUDA_ERROR_OUT_OF_MEMORY;
  memcpy(sizes_of[kernels], image, 1 + *(const uint8_t*)image);
  *module = (CUmodule)kernels;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

// The sizes go, so that a launch of what was unloaded shows.
CUresult cuModuleUnload(CUmodule module) {
  sizes_of[(uintptr_t)module][0] = 0;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  const uint8_t* sizes = sizes_of[(uintptr_t)function];
  // an argument that does not count would leave all of these out
  const uint64_t head[] = {
      (uintptr_t)function, config->gridDimX,  config->gridDimY,  config->gridDimZ,
      config->blockDimX,   config->blockDimY, config->blockDimZ, config->sharedMemBytes,
      config->numAttrs,    sizes[0],          extra != NULL,     (uintptr_t)config->hStream,
  };
  if (sizes[0] == 0) return CUDA_ERROR_INVALID_HANDLE;
  keep(head, sizeof head);
  for (unsigned i = 0; i < sizes[0]; ++i) keep(parameters[i], sizes[1 + i]);
  return CUDA_SUCCESS;
}

// Memory of the host stands for the device's.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = 49152;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_HANDLE ? "what was unloaded is launched" : "recording libcuda";
  return CUDA_SUCCESS;
}

// The rest of what Triton's driver names: nothing here may need it.
#define REFUSE(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_ERROR_NOT_SUPPORTED; }
REFUSE(cuCtxGetDevice, CUdevice* device)
REFUSE(cuCtxGetLimit, size_t* value, CUlimit limit)
REFUSE(cuCtxSetCurrent, CUcontext context)
REFUSE(cuCtxSetLimit, CUlimit limit, size_t value)
REFUSE(cuDeviceGet, CUdevice* device, int ordinal)
REFUSE(cuDevicePrimaryCtxRetain, CUcontext* context, CUdevice device)
REFUSE(cuDriverGetVersion, int* version)
REFUSE(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
REFUSE(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
REFUSE(cuStreamIsCapturing, CUstream stream, CUstreamCaptureStatus* status)
