/* A disk that fails when it is told to. Loaded with LD_PRELOAD; counts the calls below one folder that change something on the disk
 * (open for writing, write, fsync, rename, link, mkdir, remove, chmod), and does something bad at the n-th one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, FAIL_ONCE, FAIL_FROM_THEN_ON, KILL_BEFORE, KILL_AFTER, FLIP_A_BIT };

static char folder[PATH_MAX];
static char name_of_hit[PATH_MAX];
static int mode = NOTHING, nth = 0, calls = 0, error_number = ENOSPC;

/* Arms the disk: from now on calls count from 1. */
void faulty_disk_arm(const char *below, int what, int n, int error) {
    snprintf(folder, sizeof folder, "%s", below);
    name_of_hit[0] = 0;
    mode = what, nth = n, calls = 0, error_number = error;
}

/* Disarms it and gives the number of calls since it was armed. */
int faulty_disk_disarm(void) {
    mode = NOTHING;
    return calls;
}

/* The call that was hit, such as "write /folder/file". */
const char *faulty_disk_hit(void) { return name_of_hit; }

/* Whether this call is the one (or one of those). */
static int hit(const char *call, const char *path) {
    if (mode == NOTHING || path == NULL || strncmp(path, folder, strlen(folder)) != 0) return 0;
    calls++;
    if (calls != nth && !(mode == FAIL_FROM_THEN_ON && calls > nth)) return 0;
    if (calls == nth) snprintf(name_of_hit, sizeof name_of_hit, "%s %s", call, path);
    return 1;
}

static int hit_descriptor(const char *call, int descriptor) {
    char link[64], path[PATH_MAX];
    if (mode == NOTHING) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return hit(call, path);
}

static int fails(void) { return mode == FAIL_ONCE || mode == FAIL_FROM_THEN_ON; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Wraps a call whose fault has nothing to do with data. */
#define CALL(is_hit, real_call)                                   \
    int was_hit = (is_hit);                                       \
    if (was_hit && mode == KILL_BEFORE) raise(SIGKILL);           \
    if (was_hit && fails()) { errno = error_number; return -1; }  \
    __typeof__(real_call) result = (real_call);                   \
    if (was_hit && mode == KILL_AFTER) raise(SIGKILL);            \
    return result

static ssize_t write_hit(int descriptor, const void *data, size_t size) {
    if (mode == KILL_BEFORE) raise(SIGKILL);
    if (fails()) { /* as a full disk does: some of it is written, the rest never */
        if (mode == FAIL_FROM_THEN_ON && calls == nth && size > 1) return REAL(write)(descriptor, data, size / 2);
        errno = error_number;
        return -1;
    }
    if (mode == FLIP_A_BIT && size > 0) {
        char *copy = malloc(size);
        memcpy(copy, data, size);
        copy[size / 2] ^= 4;
        ssize_t written = REAL(write)(descriptor, copy, size);
        free(copy);
        return written;
    }
    ssize_t written = REAL(write)(descriptor, data, mode == KILL_AFTER && size > 1 ? size / 2 : size);
    if (mode == KILL_AFTER) raise(SIGKILL);
    return written;
}

ssize_t write(int descriptor, const void *data, size_t size) {
    return hit_descriptor("write", descriptor) ? write_hit(descriptor, data, size) : REAL(write)(descriptor, data, size);
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    if (mode == NOTHING || count < 1) return REAL(writev)(descriptor, parts, count);
    return write(descriptor, parts[0].iov_base, parts[0].iov_len); /* a short write is allowed: the caller goes on with the rest */
}
int fsync(int descriptor) { CALL(hit_descriptor("fsync", descriptor), REAL(fsync)(descriptor)); }
int fdatasync(int descriptor) { CALL(hit_descriptor("fdatasync", descriptor), REAL(fdatasync)(descriptor)); }
int ftruncate64(int descriptor, off64_t size) { CALL(hit_descriptor("ftruncate", descriptor), REAL(ftruncate64)(descriptor, size)); }
int rename(const char *from, const char *to) { CALL(hit("rename", to), REAL(rename)(from, to)); }
int symlink(const char *target, const char *path) { CALL(hit("symlink", path), REAL(symlink)(target, path)); }
int mkdir(const char *path, mode_t rights) { CALL(hit("mkdir", path), REAL(mkdir)(path, rights)); }
int chmod(const char *path, mode_t rights) { CALL(hit("chmod", path), REAL(chmod)(path, rights)); }
int fchmod(int descriptor, mode_t rights) { CALL(hit_descriptor("fchmod", descriptor), REAL(fchmod)(descriptor, rights)); }
int unlink(const char *path) { CALL(hit("unlink", path), REAL(unlink)(path)); }
int rmdir(const char *path) { CALL(hit("rmdir", path), REAL(rmdir)(path)); }

/* Removing a tree names its entries relative to an open folder. */
int unlinkat(int parent, const char *path, int flags) { CALL(hit_descriptor("unlinkat", parent), REAL(unlinkat)(parent, path, flags)); }

#define OPEN(name)                                                                                     \
    int name(const char *path, int flags, ...) {                                                       \
        va_list rest;                                                                                  \
        va_start(rest, flags);                                                                         \
        mode_t rights = flags & O_CREAT ? va_arg(rest, mode_t) : 0;                                    \
        va_end(rest);                                                                                  \
        CALL((flags & O_ACCMODE) != O_RDONLY && hit("open", path), REAL(name)(path, flags, rights));   \
    }
OPEN(open)
OPEN(open64)
