/* Answers `int3; nop`, which as_avx2.py wrote over `cpuid`, as a processor would that has AVX2 and nothing above it.

   Linked by LD_PRELOAD.  All else runs as it is: what the machine's instructions compute is not emulated. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>

/* Leaf 7 by bits: AVX-512 (F DQ IFMA PF ER CD BW VL; VBMI VBMI2 VNNI BITALG VPOPCNTDQ; 4VNNIW 4FMAPS VP2INTERSECT FP16), AMX. */
#define ABOVE_AVX2_EBX (1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31)
#define ABOVE_AVX2_ECX (1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14)
#define ABOVE_AVX2_EDX (1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25)

static void answer(int number, siginfo_t *info, void *context)
{
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)r[REG_RIP]; /* int3 leaves it at the nop */
    unsigned int leaf = r[REG_RAX], subleaf = r[REG_RCX], a, b, c, d;

    if (at[-1] != 0xcc || at[0] != 0x90) { /* not ours: die of it as ever */
        signal(number, SIG_DFL);
        raise(number);
        return;
    }
    __cpuid_count(leaf, subleaf, a, b, c, d);
    if (leaf == 7 && subleaf == 0) {
        b &= ~ABOVE_AVX2_EBX;
        c &= ~ABOVE_AVX2_ECX;
        d &= ~ABOVE_AVX2_EDX;
    } else if (leaf == 7) { /* AVX-VNNI and its relatives, AVX512_BF16, AVX10 */
        a = b = c = d = 0;
    }
    r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d;
    r[REG_RIP] += 1;
}

__attribute__((constructor)) static void install(void)
{
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGTRAP, &action, 0);
}
