/* Faults at the system calls of one process: `arm` counts what it does to files below a folder, and fails at the n-th.

   A seccomp filter traps every call that can change a file; the handler of SIGSYS looks at it and makes it, or does
   not. A preloaded library would miss what is not called through libc: rustix, under safetensors, renames by itself. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum kind { NOTHING, KILL, HALF, FULL, EIO_ONCE, DENY };
/* What a call names: a file by its descriptor, a path, a path in an open folder, or two of them. */
enum names { FD, PATH, AT, PATHS, ATS, LINK_AT };

struct call { int number; const char *name; enum names names; int at, writes, creates; };

/* at: which argument is the descriptor or path. writes: it needs space and may be made by half. */
static const struct call CALLS[] = {
    {SYS_openat, "open", AT, 0, 0, 1},
    {SYS_write, "write", FD, 0, 1, 0},
    {SYS_pwrite64, "write", FD, 0, 1, 0},
    {SYS_writev, "write", FD, 0, 1, 0},
    {SYS_pwritev, "write", FD, 0, 1, 0},
    {SYS_sendfile, "write", FD, 0, 1, 0},
    {SYS_copy_file_range, "write", FD, 2, 1, 0},
    {SYS_fallocate, "write", FD, 0, 0, 1},
    {SYS_fsync, "fsync", FD, 0, 0, 0},
    {SYS_fdatasync, "fsync", FD, 0, 0, 0},
    {SYS_ftruncate, "truncate", FD, 0, 0, 0},
    {SYS_truncate, "truncate", PATH, 0, 0, 0},
    {SYS_renameat2, "rename", ATS, 0, 0, 0},
    {SYS_linkat, "link", ATS, 0, 0, 1},
    {SYS_symlinkat, "link", LINK_AT, 1, 0, 1},
    {SYS_unlinkat, "unlink", AT, 0, 0, 0},
    {SYS_mkdirat, "mkdir", AT, 0, 0, 1},
#ifdef SYS_renameat
    {SYS_renameat, "rename", ATS, 0, 0, 0},
#endif
#ifdef SYS_open
    {SYS_open, "open", PATH, 0, 0, 1},
    {SYS_creat, "open", PATH, 0, 0, 1},
    {SYS_rename, "rename", PATHS, 0, 0, 0},
    {SYS_link, "link", PATHS, 0, 0, 1},
    {SYS_symlink, "link", PATH, 1, 0, 1},
    {SYS_unlink, "unlink", PATH, 0, 0, 0},
    {SYS_mkdir, "mkdir", PATH, 0, 0, 1},
    {SYS_rmdir, "rmdir", PATH, 0, 0, 0},
#endif
};
enum { COUNT = sizeof CALLS / sizeof *CALLS };

static char folder[PATH_MAX], match[PATH_MAX];
static long target, counted;
static enum kind kind;
static int log_fd, failing;

/* The one place from which the filter lets every call through. */
long gate(long number, long a, long b, long c, long d, long e, long f);
extern char gate_return[];
#if defined __x86_64__
#define ARCH AUDIT_ARCH_X86_64
#define ARGUMENT(u, i) ((u)->uc_mcontext.gregs[(int[]){REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9}[i]])
#define RESULT(u) ((u)->uc_mcontext.gregs[REG_RAX])
__asm__(".text\n.global gate\ngate: mov %rdi,%rax\nmov %rsi,%rdi\nmov %rdx,%rsi\nmov %rcx,%rdx\nmov %r8,%r10\n"
        "mov %r9,%r8\nmov 8(%rsp),%r9\nsyscall\n.global gate_return\ngate_return: ret\n");
#elif defined __aarch64__
#define ARCH AUDIT_ARCH_AARCH64
#define ARGUMENT(u, i) ((u)->uc_mcontext.regs[i])
#define RESULT(u) ((u)->uc_mcontext.regs[0])
__asm__(".text\n.global gate\ngate: mov x8,x0\nmov x0,x1\nmov x1,x2\nmov x2,x3\nmov x3,x4\nmov x4,x5\nmov x5,x6\n"
        "svc 0\n.global gate_return\ngate_return: ret\n");
#endif

/* What a link below /proc/self points to. */
static void read_link(const char *link, char *path) {
    long length = gate(SYS_readlinkat, AT_FDCWD, (long)link, (long)path, PATH_MAX - 1, 0, 0);
    path[length < 0 ? 0 : length] = 0;
}

static void path_of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    read_link(link, path);
}

static void absolute(int at, const char *name, char *path) {
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    if (at == AT_FDCWD)
        read_link("/proc/self/cwd", path);
    else
        path_of_fd(at, path);
    size_t length = strlen(path);
    snprintf(path + length, PATH_MAX - length, "/%s", name);
}

/* The file that a call changes, and where it renames or links the new name. */
static void paths_of(const struct call *call, const long *a, char *path, char *second) {
    const long *here = a + call->at;
    second[0] = 0;
    if (call->names == FD)
        path_of_fd(here[0], path);
    else if (call->names == PATH || call->names == PATHS)
        absolute(AT_FDCWD, (char *)here[0], path);
    else
        absolute(here[0], (char *)here[1], path);
    if (call->names == PATHS)
        absolute(AT_FDCWD, (char *)here[1], second);
    if (call->names == ATS)
        absolute(here[2], (char *)here[3], second);
}

static int is_below(const char *path) {
    size_t length = strlen(folder);
    return !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

/* A call that opens a file and leaves it as it is. */
static int only_reads(const struct call *call, const long *a) {
    int changes = O_WRONLY | O_RDWR | O_CREAT | O_TRUNC;
    if (call->number == SYS_openat)
        return !(a[2] & changes);
#ifdef SYS_open
    if (call->number == SYS_open)
        return !(a[1] & changes);
#endif
    return 0;
}

static long half(const struct call *call, const long *a) {
    int number = call->number;
    if (number == SYS_writev || number == SYS_pwritev) {
        const struct iovec *part = (const struct iovec *)a[1];
        return gate(SYS_write, a[0], (long)part->iov_base, part->iov_len / 2, 0, 0, 0);
    }
    int length = number == SYS_sendfile ? 3 : number == SYS_copy_file_range ? 4 : 2;
    long b[6];
    memcpy(b, a, sizeof b);
    b[length] /= 2;
    return gate(number, b[0], b[1], b[2], b[3], b[4], b[5]);
}

static void die(void) {
    gate(SYS_kill, gate(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
}

static void note(long n, const struct call *call, const char *path, const char *second) {
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", n, call->name, path, second);
    if (log_fd >= 0)
        gate(SYS_write, log_fd, (long)line, length, 0, 0, 0);
}

static long make(const struct call *call, const long *a) {
    char path[PATH_MAX], second[PATH_MAX];
    paths_of(call, a, path, second);
    int below = is_below(path) || (second[0] && is_below(second));
    int matches = below && (strstr(path, match) || (second[0] && strstr(second, match)));
    int reads = only_reads(call, a);
    if (kind == DENY && matches && (call->creates || call->writes))
        return -EACCES;
    if (below && !reads) {
        long n = matches ? __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST) : 0;
        if (matches)
            note(n, call, path, second);
        int now = n && n == target;
        if (now && kind == KILL)
            die();
        if (now && kind == HALF) {
            call->writes ? half(call, a) : gate(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
            die();
        }
        if (now && kind == EIO_ONCE)
            return -EIO;
        failing |= now && kind == FULL;
        if (failing && (call->writes || call->creates))
            return -ENOSPC;
    }
    return gate(call->number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static void handle(int signal_number, siginfo_t *info, void *context) {
    (void)signal_number;
    ucontext_t *u = context;
    long a[6];
    for (int i = 0; i < 6; i++)
        a[i] = ARGUMENT(u, i);
    for (int i = 0; i < COUNT; i++)
        if (CALLS[i].number == info->si_syscall) {
            RESULT(u) = make(&CALLS[i], a);
            return;
        }
}

static int install(void) {
    struct sock_filter program[COUNT + 9];
    int at = 0;
    unsigned long address = (unsigned long)gate_return;
    program[at++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < COUNT; i++) /* to the look at the caller */
        program[at++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, CALLS[i].number, COUNT - i, 0);
    program[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    size_t caller = offsetof(struct seccomp_data, instruction_pointer);
    program[at++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, caller);
    program[at++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)address, 0, 3);
    program[at++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, caller + 4);
    program[at++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(address >> 32), 0, 1);
    program[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    program[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    struct sock_fprog filter = {at, program};
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
    if (sigaction(SIGSYS, &action, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return -1;
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter);
}

/* Once a process. folder: without links and slash at its end. part: only paths with it count ("" all). n: from 1, at
   which `what` happens. log: a descriptor for a line a call ("n, call, path, new path"), or -1. Returns 0. */
int arm(const char *below, const char *part, long n, int what, int log) {
    snprintf(folder, sizeof folder, "%s", below);
    snprintf(match, sizeof match, "%s", part);
    target = n, kind = what, log_fd = log;
    return install();
}
