/* A driver's libnvidia-ml.so.1 for tests: it answers nvidia-ml-py out of the text file that SKERRY_FAKE_NVML names.
 *
 * A line is `driver VERSION CUDA`, `hang SECONDS` (every call takes as long), or a GPU:
 *   gpu UUID SM TOTAL_MIB USED_MIB MIG UTILIZATION CELSIUS MILLIWATTS MILLIJOULES REASONS NAME...
 * where -1 stands for what the GPU does not support, and an SM of 0 for one that is lost. No file: no driver.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, NO_DRIVER = 9, LOST = 15, CARDS = 16 };
struct card {
  char uuid[96], name[96];
  int sm, mig, utilization, celsius;
  long long total, used, milliwatts, millijoules, reasons;
};
static struct card cards[CARDS];
static int count, cuda;
static char driver[80];

static int load(void) {
  const char* path = getenv("SKERRY_FAKE_NVML");
  FILE* file = path ? fopen(path, "r") : NULL;
  char line[512];
  double seconds;
  if (!file) return NO_DRIVER;
  count = 0;
  while (fgets(line, sizeof line, file)) {
    struct card* c = &cards[count];
    if (sscanf(line, "hang %lf", &seconds) == 1) usleep((useconds_t)(seconds * 1e6));
    if (sscanf(line, "driver %79s %d", driver, &cuda) == 2) continue;
    if (count < CARDS && sscanf(line, "gpu %95s %d %lld %lld %d %d %d %lld %lld %lld %95[^\n]", c->uuid, &c->sm, &c->total,
               &c->used, &c->mig, &c->utilization, &c->celsius, &c->milliwatts, &c->millijoules, &c->reasons, c->name) == 11) {
      count++;
    }
  }
  fclose(file);
  return OK;
}

#define CARD struct card* c = handle
#define TELL(value, out, type) do { if ((value) < 0) return NOT_SUPPORTED; *(out) = (type)(value); return OK; } while (0)

int nvmlInit_v2(void) { return load(); }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return load(); }
int nvmlShutdown(void) { return OK; }
const char* nvmlErrorString(int code) { return code == NO_DRIVER ? "Driver Not Loaded" : code == LOST ? "GPU is lost" : "Error"; }
int nvmlSystemGetDriverVersion(char* out, unsigned size) { snprintf(out, size, "%s", driver); return OK; }
int nvmlSystemGetCudaDriverVersion(int* out) { *out = cuda; return OK; }
int nvmlDeviceGetCount_v2(unsigned* out) { int code = load(); *out = (unsigned)count; return code; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** out) {
  if (index >= (unsigned)count) return INVALID;
  if (cards[index].sm == 0) return LOST;
  *out = &cards[index];
  return OK;
}
int nvmlDeviceGetName(void* handle, char* out, unsigned size) { CARD; snprintf(out, size, "%s", c->name); return OK; }
int nvmlDeviceGetUUID(void* handle, char* out, unsigned size) { CARD; snprintf(out, size, "%s", c->uuid); return OK; }
int nvmlDeviceGetCudaComputeCapability(void* handle, int* major, int* minor) { CARD; *major = c->sm / 10; *minor = c->sm % 10; return OK; }
int nvmlDeviceGetMemoryInfo(void* handle, unsigned long long* out) {
  CARD;
  out[0] = (unsigned long long)c->total << 20;
  out[1] = (unsigned long long)(c->total - c->used) << 20;
  out[2] = (unsigned long long)c->used << 20;
  return OK;
}
int nvmlDeviceGetMigMode(void* handle, unsigned* now, unsigned* next) { CARD; *next = 0; TELL(c->mig, now, unsigned); }
int nvmlDeviceGetUtilizationRates(void* handle, unsigned* out) { CARD; out[1] = 0; TELL(c->utilization, out, unsigned); }
int nvmlDeviceGetTemperature(void* handle, int sensor, unsigned* out) { CARD; (void)sensor; TELL(c->celsius, out, unsigned); }
int nvmlDeviceGetPowerUsage(void* handle, unsigned* out) { CARD; TELL(c->milliwatts, out, unsigned); }
int nvmlDeviceGetTotalEnergyConsumption(void* handle, unsigned long long* out) { CARD; TELL(c->millijoules, out, unsigned long long); }
int nvmlDeviceGetCurrentClocksEventReasons(void* handle, unsigned long long* out) { CARD; TELL(c->reasons, out, unsigned long long); }
