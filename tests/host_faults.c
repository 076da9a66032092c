/* Preloaded into the processes of a test host: shifts its clock, and makes a folder slow.

   The settings are in a file that `Cluster.clock` and `Cluster.slow_disk` change while processes run. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct settings {
    long clock; /* seconds added to the time of day */
    double slow; /* seconds that each call takes */
    char folder[PATH_MAX]; /* for files in it */
};
static struct settings none;
static volatile struct settings *now = &none;
static int (*real_clock)(clockid_t, struct timespec *);

void read_settings(const char *path) {
    int file = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    void *map = mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, file, 0);
    if (map != MAP_FAILED) now = map;
    close(file);
}

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("HOST_FAULTS");
    real_clock = dlsym(RTLD_NEXT, "clock_gettime");
    if (path) read_settings(path);
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = real_clock ? real_clock(clock, time) : syscall(SYS_clock_gettime, clock, time);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) time->tv_sec += now->clock;
    return result;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    (void)zone;
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    time->tv_sec = precise.tv_sec;
    time->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (result) *result = precise.tv_sec;
    return precise.tv_sec;
}

static void delay(const char *path) {
    if (strncmp(path, (const char *)now->folder, strlen((const char *)now->folder))) return;
    struct timespec left = {(time_t)now->slow, (long)((now->slow - (time_t)now->slow) * 1e9)};
    while (nanosleep(&left, &left)) {}
}

static void delay_file(int file) {
    if (now->slow <= 0) return;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return;
    path[length] = 0;
    delay(path);
}

#define SLOW(TYPE, NAME, NUMBER, PARAMETERS, ...)         \
    TYPE NAME PARAMETERS {                                \
        delay_file(file);                                 \
        return syscall(NUMBER, __VA_ARGS__);              \
    }
SLOW(ssize_t, read, SYS_read, (int file, void *data, size_t size), file, data, size)
SLOW(ssize_t, write, SYS_write, (int file, const void *data, size_t size), file, data, size)
SLOW(ssize_t, writev, SYS_writev, (int file, const struct iovec *data, int count), file, data, count)
SLOW(ssize_t, pread64, SYS_pread64, (int file, void *data, size_t size, off_t at), file, data, size, at)
SLOW(ssize_t, pwrite64, SYS_pwrite64, (int file, const void *data, size_t size, off_t at), file, data, size, at)
SLOW(int, fsync, SYS_fsync, (int file), file)
SLOW(int, fdatasync, SYS_fdatasync, (int file), file)

#define OPEN(NAME)                                                               \
    int NAME(const char *path, int flags, ...) {                                 \
        va_list more;                                                            \
        va_start(more, flags);                                                   \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0;        \
        va_end(more);                                                            \
        if (now->slow > 0) delay(path);                                          \
        return syscall(SYS_openat, AT_FDCWD, path, flags, mode);                 \
    }
OPEN(open)
OPEN(open64)
