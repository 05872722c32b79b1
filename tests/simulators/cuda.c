/* A CUDA driver's libcuda.so.1 for tests: it writes down what it is asked, line by line, to stdout.
 *
 * SKERRY_FAKE_CUDA=no-context, or the name of a function that then fails with CUDA_ERROR_INVALID_VALUE. A module is the
 * text at the address it is loaded from, a function the kernel's name; a launch shows the first 4 bytes of its argument.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failing(const char* name) {
  const char* asked = getenv("SKERRY_FAKE_CUDA");
  return asked && strcmp(asked, name) == 0;
}
#define CALLED(name) if (failing(name)) return 1

int cuGetErrorName(int code, const char** name) { *name = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : NULL; return code != 1; }
int cuCtxGetCurrent(void** context) { *context = failing("no-context") ? NULL : (void*)0x10; return 0; }
int cuCtxGetDevice(int* device) { CALLED("cuCtxGetDevice"); *device = 0; return 0; }
int cuDeviceGetAttribute(int* value, int what, int device) {
  (void)device;
  *value = what == 75 ? 8 : what == 76 ? 9 : what == 16 ? 58 : what == 97 ? 101376 : -1;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  CALLED("cuModuleLoadData");
  *module = strndup(image, 6);
  printf("load %s\n", (char*)*module);
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  CALLED("cuModuleGetFunction");
  *function = strdup(name);
  printf("find %s in %s\n", name, (char*)module);
  return 0;
}
int cuFuncSetAttribute(void* function, int what, int value) { printf("set %s %d %d\n", (char*)function, what, value); return 0; }
static int launch(const char* how, const char* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared, void* stream, void** arguments) {
  int first;
  memcpy(&first, arguments[0], 4);
  printf("%s %s %u,%u,%u %u %u %p %d\n", how, function, x, y, z, threads, shared, stream, first);
  return 0;
}
int cuLaunchKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments, void** extra) {
  CALLED("cuLaunchKernel");
  (void)by, (void)bz, (void)extra;
  return launch("launch", f, x, y, z, bx, shared, stream, arguments);
}
int cuLaunchCooperativeKernel(void* f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** arguments) {
  (void)by, (void)bz;
  return launch("together", f, x, y, z, bx, shared, stream, arguments);
}
