/* Hides instruction sets from a program, to measure on a newer processor what an older one would choose:
 *
 *     cc -O1 -shared -fPIC -o cpuid.so cpuid.c
 *     CPUID_HIDES=amx,avx512 LD_PRELOAD=./cpuid.so PROGRAM
 *
 * Linux lets a process trap its own cpuid instructions where the processor has "cpuid_fault" (arch_prctl(2),
 * ARCH_SET_CPUID). Bits: "CPUID" of the Intel 64 Software Developer's Manual, leaf 7. Caches and clock stay the newer one's.
 */
#define _GNU_SOURCE /* the names of registers */
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012 };
#define BIT(n) (1u << (n))

static const struct hidden {
    const char *name;
    uint32_t ebx, ecx, edx, eax_1; /* of leaf 7, and of its subleaf 1 */
} HIDDEN[] = {
    {"amx", 0, 0, BIT(22) | BIT(24) | BIT(25), BIT(21)},
    {"avx-vnni", 0, 0, 0, BIT(4)},
    {"avx512-vnni", 0, BIT(11), 0, 0},
    {"avx512", BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31),
     BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14), BIT(2) | BIT(3) | BIT(8) | BIT(23), BIT(5)},
};
enum { SETS = sizeof HIDDEN / sizeof *HIDDEN };
static int hides[SETS];

static int trapping(int on) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, !on); }

static void answered(int signal_number, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)r[REG_RIP];
    if (at[0] != 0x0f || at[1] != 0xa2) { /* no cpuid: a fault of the program's own */
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    uint32_t leaf = r[REG_RAX], sub = r[REG_RCX], a, b, c, d;
    trapping(0);
    __cpuid_count(leaf, sub, a, b, c, d);
    trapping(1);
    for (int n = 0; n < SETS && leaf == 7; n++)
        if (hides[n] && sub == 0) b &= ~HIDDEN[n].ebx, c &= ~HIDDEN[n].ecx, d &= ~HIDDEN[n].edx;
        else if (hides[n] && sub == 1) a &= ~HIDDEN[n].eax_1;
    r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d;
    r[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void) {
    const char *wish = getenv("CPUID_HIDES");
    if (!wish || !*wish) return;
    char *words = strdup(wish);
    for (char *word = strtok(words, ","); word; word = strtok(NULL, ",")) {
        int n = 0;
        while (n < SETS && strcmp(word, HIDDEN[n].name)) n++;
        if (n == SETS) fprintf(stderr, "CPUID_HIDES: %s is unknown\n", word), exit(2);
        hides[n] = 1;
    }
    free(words);
    struct sigaction action = {0};
    action.sa_sigaction = answered;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, NULL);
    if (trapping(1)) perror("CPUID_HIDES: this processor or kernel cannot trap cpuid"), exit(2);
}
