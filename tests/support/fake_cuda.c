/* Stands in for CUDA's driver where there is no GPU: writes each call, and every argument of a launch, into a file.
 *
 * CUDA_CALLS names the file, CUDA_ARGUMENTS the bytes of each of the launch's arguments ("8 8 4"), CUDA_FAILS a call
 * that answers with an error.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int told(const char *call, const char *text) {
    FILE *file = fopen(getenv("CUDA_CALLS"), "a");
    const char *fails = getenv("CUDA_FAILS");
    fprintf(file, "%s %s\n", call, text);
    fclose(file);
    return fails && !strcmp(fails, call) ? 209 : 0;
}

int cuCtxGetCurrent(void **context) {
    *context = (void *)0xc0;
    return told("cuCtxGetCurrent", "");
}

int cuModuleLoadData(void **module, const void *image) {
    char text[64];
    snprintf(text, sizeof text, "%.4s", (const char *)image + 1);
    *module = (void *)0xd0;
    return told("cuModuleLoadData", text);
}

int cuModuleUnload(void *module) { return told("cuModuleUnload", module == (void *)0xd0 ? "ours" : "other"); }

int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = module == (void *)0xd0 ? (void *)0xf0 : NULL;
    return told("cuModuleGetFunction", name);
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    char text[64];
    snprintf(text, sizeof text, "%p %d %d", function, attribute, value);
    return told("cuFuncSetAttribute", text);
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
    char text[4096], *sizes = strdup(getenv("CUDA_ARGUMENTS"));
    int length = snprintf(text, sizeof text, "%p grid %u %u %u block %u %u %u shared %u stream %p arguments", function,
                          gx, gy, gz, bx, by, bz, shared, stream);
    for (char *size = strtok(sizes, " "); size; size = strtok(NULL, " "), ++arguments) {
        uint64_t value = atoi(size) == 4 ? *(const uint32_t *)*arguments : *(const uint64_t *)*arguments;
        length += snprintf(text + length, sizeof text - length, " %#lx", value);
    }
    free(sizes);
    return told("cuLaunchKernel", extra ? "with extra" : text);
}

int cuGetErrorName(int code, const char **text) {
    *text = "CUDA_ERROR_NO_BINARY_FOR_GPU";
    return 0;
}
