/* A libcuda for a machine without a GPU: it loads kernels, runs none, and hands launches to a callback. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int Result;
typedef void (*OnLaunch)(void *function, unsigned programs, unsigned threads, void **parameters);

enum { MAX_FUNCTIONS = 65536, FIRST_HANDLE = 4096 };
static OnLaunch on_launch = NULL;
static int registers[MAX_FUNCTIONS];
static int functions = 0;

static int has_context = 1;

void stub_forget_context(void) { has_context = 0; }
void stub_set_on_launch(OnLaunch callback) { on_launch = callback; }

/* Registers of a thread, from the section .nv.info of a cubin (ELF64): format 4, attribute 0x2f, 8 bytes
   of a symbol and the number. */
static int registers_of(const unsigned char *image) {
    static const unsigned char attribute[4] = {4, 0x2f, 8, 0};
    uint64_t section_table;
    uint16_t entry_size, sections;
    memcpy(&section_table, image + 40, 8);
    memcpy(&entry_size, image + 58, 2);
    memcpy(&sections, image + 60, 2);
    for (int k = 0; k < sections; k++) {
        const unsigned char *header = image + section_table + (uint64_t)k * entry_size;
        uint32_t type, count;
        uint64_t offset, size;
        memcpy(&type, header + 4, 4);
        memcpy(&offset, header + 24, 8);
        memcpy(&size, header + 32, 8);
        if (type != 0x70000000) continue;
        for (uint64_t at = 0; at + 12 <= size; at += 4)
            if (!memcmp(image + offset + at, attribute, 4)) {
                memcpy(&count, image + offset + at + 8, 4);
                return (int)count;
            }
    }
    return 0;
}

Result cuModuleLoadData(void **module, const void *image) {
    if (functions == MAX_FUNCTIONS) return 2;
    registers[functions] = registers_of(image);
    *module = (void *)(intptr_t)(FIRST_HANDLE + functions++);
    return 0;
}
Result cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = module;
    return 0;
}
Result cuModuleUnload(void *module) { return 0; }

Result cuFuncGetAttribute(int *value, int attribute, void *function) {
    if (attribute == 0) *value = 1024; /* threads of a block */
    else if (attribute == 4) *value = registers[(intptr_t)function - FIRST_HANDLE];
    else *value = 0;
    return 0;
}
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }

Result cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                      unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                      void *stream, void **parameters, void **extra) {
    if (!has_context) return 201; /* CUDA_ERROR_INVALID_CONTEXT */
    if (on_launch) on_launch(function, grid_x, block_x, parameters);
    return 0;
}
Result cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
    return 0;
}

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = 1024; break;             /* threads of a block */
    case 10: *value = 32; break;              /* warp size */
    case 12: *value = 65536; break;           /* registers of a block */
    case 16: *value = 132; break;             /* multiprocessors */
    case 8: case 97: *value = 232448; break;  /* shared memory */
    default: *value = 1000000;
    }
    return 0;
}
Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "stub"; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
Result cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
Result cuCtxSetCurrent(void *context) { has_context = context != NULL; return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { *count = 1; return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
Result cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) { *value = pointer; return 0; }
Result cuPointerGetAttributes(unsigned count, int *attributes, void **data, uint64_t pointer) {
    for (unsigned k = 0; k < count; k++) {
        if (attributes[k] == 3) *(void **)data[k] = (void *)pointer;
        else *(int *)data[k] = 0;
    }
    return 0;
}
Result cuStreamIsCapturing(void *stream, int *capturing) { *capturing = 0; return 0; }
Result cuStreamGetCaptureInfo(void) { return 0; }
