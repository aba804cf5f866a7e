/* A stand-in for NVIDIA's management library, libnvidia-ml.so.1: the functions that Headroom reads, with NVML's own C
 * signatures and structures (nvml.h), over made-up devices. What they say is set with fake_set and fake_fail, or in the
 * environment: FAKE_NVML="devices=2 power_mw=350500 1.power_mw=90000 fail.nvmlDeviceGetPowerUsage=3".
 *
 * The energy counter runs by itself: it is the integral of the power that was set, over real time.
 * With OLD_DRIVER defined, functions of newer drivers are missing from the library.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, VERSION_MISMATCH = 25, MOST_DEVICES = 8, MOST_FAILURES = 32 };

typedef struct {
    const char *name;
    long long value;
} Field;

enum { MEMORY_TOTAL, MEMORY_RESERVED, MEMORY_USED, GPU_PERCENT, MEMORY_PERCENT, TEMPERATURE, POWER_MW, POWER_LIMIT_MW,
       SM_CLOCK, MEMORY_CLOCK, REASONS, ENERGY_MJ, FIELDS };
static const char *FIELD_NAMES[FIELDS] = {
    "memory_total", "memory_reserved", "memory_used", "gpu_percent", "memory_percent", "temperature", "power_mw",
    "power_limit_mw", "sm_clock", "memory_clock", "reasons", "energy_mj" };
static const long long DEFAULTS[FIELDS] = {
    85899345920LL, 536870912LL, 4294967296LL, 87, 41, 61, 350500, 700000, 1980, 2619, 0, 1000000 };

typedef struct {
    unsigned index;
    long long values[FIELDS];
    double counted_at; /* seconds; the energy counter is right as of then */
} Device;

static Device devices[MOST_DEVICES];
static unsigned device_count = 1;
static int references = 0, made = 0;
static struct { char function[64]; int device, code; } failures[MOST_FAILURES]; /* device -1: every one */
static int failure_count = 0;

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

static void count_energy(Device *device) {
    double at = now();
    device->values[ENERGY_MJ] += (long long)(device->values[POWER_MW] * (at - device->counted_at));
    device->counted_at = at;
}

void fake_reset(void) {
    device_count = 1, failure_count = 0, made = 1, references = 0;
    for (unsigned i = 0; i < MOST_DEVICES; i++) {
        devices[i].index = i;
        memcpy(devices[i].values, DEFAULTS, sizeof DEFAULTS);
        devices[i].counted_at = now();
    }
}

/* One reading of one device; of every device if it is -1. Returns 0 for a name that there is not. */
int fake_set(int device, const char *name, long long value) {
    if (strcmp(name, "devices") == 0) { device_count = (unsigned)value; return 1; }
    for (int field = 0; field < FIELDS; field++) {
        if (strcmp(name, FIELD_NAMES[field]) != 0) continue;
        for (int i = 0; i < MOST_DEVICES; i++) {
            if (device != -1 && device != i) continue;
            count_energy(&devices[i]);
            devices[i].values[field] = value;
        }
        return 1;
    }
    return 0;
}

/* Let a function answer with an error code from now on; 0 heals it. */
void fake_fail(const char *function, int device, int code) {
    int place = 0;
    while (place < failure_count && (strcmp(failures[place].function, function) != 0 || failures[place].device != device))
        place++;
    if (place == MOST_FAILURES) abort();
    if (place == failure_count) failure_count++;
    snprintf(failures[place].function, sizeof failures[place].function, "%s", function);
    failures[place].device = device, failures[place].code = code;
}

int fake_references(void) { return references; }

static int failing(const char *function, int device) {
    for (int i = 0; i < failure_count; i++)
        if (strcmp(failures[i].function, function) == 0 && (failures[i].device == -1 || failures[i].device == device))
            if (failures[i].code) return failures[i].code;
    return references > 0 ? SUCCESS : UNINITIALIZED;
}

static void read_environment(void) {
    const char *given = getenv("FAKE_NVML");
    char text[1024], *word, *rest = text;
    if (!given) return;
    snprintf(text, sizeof text, "%s", given);
    while ((word = strsep(&rest, " "))) {
        char *value = strchr(word, '=');
        int device = -1;
        if (!value) continue;
        *value++ = 0;
        if (strncmp(word, "fail.", 5) == 0) { fake_fail(word + 5, -1, atoi(value)); continue; }
        if (word[0] >= '0' && word[0] <= '9') { device = atoi(word); word = strchr(word, '.') + 1; }
        if (!fake_set(device, word, atoll(value))) { fprintf(stderr, "FAKE_NVML: no reading %s\n", word); abort(); }
    }
}

#define ENTER(device) \
    do { int code_ = failing(__func__, (device) ? (int)((Device *)(device))->index : -1); if (code_) return code_; } while (0)
#define VALUE(device, field) (((Device *)(device))->values[field])
#define READING(function, type, field) \
    int function(void *device, type *out) { ENTER(device); *out = (type)VALUE(device, field); return SUCCESS; }

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (!made) { fake_reset(); read_environment(); }
    references++;
    int code = failing(__func__, -1);
    if (code) references--;
    return code;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { ENTER(NULL); references--; return SUCCESS; }
const char *nvmlErrorString(int code) {
    static const char *texts[] = { "Success", "Uninitialized", "Invalid Argument", "Not Supported",
        "Insufficient Permissions", "Already Initialized", "Not Found", "Insufficient Size",
        "Insufficient External Power", "Driver Not Loaded" };
    return code == 15 ? "GPU is lost" : code >= 0 && code < 10 ? texts[code] : "Unknown Error";
}
int nvmlDeviceGetCount_v2(unsigned *count) { ENTER(NULL); *count = device_count; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index >= device_count) return INVALID_ARGUMENT;
    ENTER(&devices[index]);
    *device = &devices[index];
    return SUCCESS;
}
int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    ENTER(device);
    snprintf(name, length, "NVIDIA H100 80GB HBM3");
    return SUCCESS;
}
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    ENTER(device);
    snprintf(uuid, length, "GPU-00000000-0000-0000-0000-%012u", ((Device *)device)->index);
    return SUCCESS;
}

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned gpu, memory; } Utilization;

/* The first version counts what the driver reserves as used. */
int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
    ENTER(device);
    memory->total = VALUE(device, MEMORY_TOTAL);
    memory->used = VALUE(device, MEMORY_USED) + VALUE(device, MEMORY_RESERVED);
    memory->free = memory->total - memory->used;
    return SUCCESS;
}
int nvmlDeviceGetUtilizationRates(void *device, Utilization *rates) {
    ENTER(device);
    rates->gpu = VALUE(device, GPU_PERCENT), rates->memory = VALUE(device, MEMORY_PERCENT);
    return SUCCESS;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *out) {
    ENTER(device);
    if (sensor != 0) return INVALID_ARGUMENT;
    *out = VALUE(device, TEMPERATURE);
    return SUCCESS;
}
int nvmlDeviceGetClockInfo(void *device, int clock, unsigned *out) {
    ENTER(device);
    if (clock != 1 && clock != 2) return INVALID_ARGUMENT;
    *out = VALUE(device, clock == 1 ? SM_CLOCK : MEMORY_CLOCK);
    return SUCCESS;
}
READING(nvmlDeviceGetPowerUsage, unsigned, POWER_MW)
READING(nvmlDeviceGetEnforcedPowerLimit, unsigned, POWER_LIMIT_MW)
READING(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, REASONS)

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(void *device, MemoryV2 *memory) {
    ENTER(device);
    if (memory->version != (sizeof(MemoryV2) | 2u << 24)) return VERSION_MISMATCH;
    memory->total = VALUE(device, MEMORY_TOTAL), memory->used = VALUE(device, MEMORY_USED);
    memory->reserved = VALUE(device, MEMORY_RESERVED);
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}
READING(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, REASONS)
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *out) {
    ENTER(device);
    count_energy(device);
    *out = VALUE(device, ENERGY_MJ);
    return SUCCESS;
}
#endif
