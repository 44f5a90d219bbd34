// A disk that is full from the n-th file on that a program opens for writing in a folder: LD_PRELOAD it.
//
// FULL_DISK_FOLDER: the folder. FULL_DISK_AT: n, from 1. FULL_DISK_LOG: a file that the names are written to.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILES 65536
static atomic_char full[FILES];  // by descriptor
static atomic_long opened;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int watch(int file, int flags) {
  const char *folder = getenv("FULL_DISK_FOLDER");
  if (file < 0 || file >= FILES) return file;
  full[file] = 0;
  if (!folder || (flags & O_ACCMODE) == O_RDONLY) return file;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 2);
  if (length < 0) return file;
  path[length] = 0;
  if (strncmp(path, folder, strlen(folder))) return file;
  long number = atomic_fetch_add(&opened, 1) + 1;
  full[file] = number >= atol(getenv("FULL_DISK_AT"));
  const char *log = getenv("FULL_DISK_LOG");
  if (log) {
    int out = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    path[length] = '\n';
    if (out >= 0 && REAL(write)(out, path, length + 1) >= 0) close(out);
  }
  return file;
}

#define OPEN(name)                                                                \
  int name(const char *path, int flags, ...) {                                    \
    va_list more;                                                                 \
    va_start(more, flags);                                                        \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;       \
    va_end(more);                                                                 \
    return watch(REAL(name)(path, flags, mode), flags);                           \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                              \
  int name(int folder, const char *path, int flags, ...) {                        \
    va_list more;                                                                 \
    va_start(more, flags);                                                        \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;       \
    va_end(more);                                                                 \
    return watch(REAL(name)(folder, path, flags, mode), flags);                   \
  }
OPENAT(openat)
OPENAT(openat64)

static int no_space(int file) {
  if (file < 0 || file >= FILES || !full[file]) return 0;
  errno = ENOSPC;
  return 1;
}

ssize_t write(int file, const void *data, size_t size) { return no_space(file) ? -1 : REAL(write)(file, data, size); }

ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
  return no_space(file) ? -1 : REAL(pwrite)(file, data, size, at);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
  return no_space(file) ? -1 : REAL(pwrite64)(file, data, size, at);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
  return no_space(file) ? -1 : REAL(writev)(file, parts, count);
}

FILE *fopen64(const char *path, const char *mode) {
  FILE *file = REAL(fopen64)(path, mode);
  if (file) watch(fileno(file), strchr(mode, 'r') && !strchr(mode, '+') ? O_RDONLY : O_WRONLY);
  return file;
}
