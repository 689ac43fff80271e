/*
 * A library for LD_PRELOAD that simulates a full disk and a wrong wall clock. The test controls it through a file.
 *
 * FAULTS_CONTROL names that file. Its first eight bytes are an offset in seconds, added to the wall clock. The next eight
 * bytes are nonzero while the disk is full. FAULTS_DIRECTORY names the directory on the full disk: files in it can be
 * overwritten, but cannot grow.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t clock_seconds;
    int64_t disk_is_full;
};

static const struct control no_faults;
static const volatile struct control *control = &no_faults;
static const char *directory = "";

__attribute__((constructor)) static void map_control_file(void) {
    const char *path = getenv("FAULTS_CONTROL");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file >= 0) {
        void *mapped = mmap(NULL, sizeof(struct control), PROT_READ, MAP_SHARED, file, 0);
        if (mapped != MAP_FAILED)
            control = mapped;
        close(file);
    }
    if (getenv("FAULTS_DIRECTORY"))
        directory = getenv("FAULTS_DIRECTORY");
}

/*
 * Returns whether a write that ends at this offset would make a file on the full disk grow. A negative end is a length,
 * counted from the current position.
 */
static int lacks_space(int file, int64_t end) {
    char link[64], path[PATH_MAX];
    struct stat found;
    if (!control->disk_is_full || fstat(file, &found) != 0 || !S_ISREG(found.st_mode))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    if (strncmp(path, directory, strlen(directory)) != 0)
        return 0;
    if (end < 0) {
        int flags = fcntl(file, F_GETFL);
        int64_t position = flags & O_APPEND ? found.st_size : lseek(file, 0, SEEK_CUR);
        end = position - end;
    }
    return end > found.st_size;
}

static int64_t length_of(const struct iovec *parts, int count) {
    int64_t length = 0;
    for (int i = 0; i < count; i++)
        length += parts[i].iov_len;
    return length;
}

static int no_space(void) {
    errno = ENOSPC;
    return -1;
}

ssize_t write(int file, const void *bytes, size_t length) {
    return lacks_space(file, -(int64_t)length) ? no_space() : syscall(SYS_write, file, bytes, length);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    return lacks_space(file, -length_of(parts, count)) ? no_space() : syscall(SYS_writev, file, parts, count);
}

ssize_t pwrite(int file, const void *bytes, size_t length, off_t at) {
    return lacks_space(file, at + length) ? no_space() : syscall(SYS_pwrite64, file, bytes, length, at);
}

ssize_t pwrite64(int file, const void *bytes, size_t length, off_t at) {
    return pwrite(file, bytes, length, at);
}

ssize_t pwritev(int file, const struct iovec *parts, int count, off_t at) {
    int64_t end = at + length_of(parts, count);
    return lacks_space(file, end) ? no_space() : syscall(SYS_pwritev, file, parts, count, at, 0);
}

ssize_t pwritev64(int file, const struct iovec *parts, int count, off_t at) {
    return pwritev(file, parts, count, at);
}

int ftruncate(int file, off_t length) {
    return lacks_space(file, length) ? no_space() : syscall(SYS_ftruncate, file, length);
}

int posix_fallocate(int file, off_t at, off_t length) {
    if (lacks_space(file, at + length))
        return ENOSPC;
    return syscall(SYS_fallocate, file, 0, at, length) == 0 ? 0 : errno;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += control->clock_seconds;
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    int result = syscall(SYS_gettimeofday, now, zone);
    if (result == 0)
        now->tv_sec += control->clock_seconds;
    return result;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result)
        *result = now.tv_sec;
    return now.tv_sec;
}
