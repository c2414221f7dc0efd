/* A plugin for qemu's user emulation of 64-bit Arm: instructions executed between marks, by kind.
 *
 * A mark is a system call with the number 5000, which Linux does not have: what has been counted since the one before is
 * written to standard error as one line, "LFM mark vector memory other". The interface is qemu's qemu-plugin.h, version 1
 * (qemu 4.2 to 8.2), of which this declares what it needs, as Debian 12 has no package with that header.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info_t;
enum { INLINE_ADD_U64 = 0 };

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int operation, void *counter, uint64_t);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, unsigned, int64_t, uint64_t,
    uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

enum kind { VECTOR, MEMORY, OTHER, KINDS };
static uint64_t counted[KINDS];
static const int64_t MARK = 5000;

/* "A64 instruction set encoding" of the Arm Architecture Reference Manual: bits 28 to 25 tell the group. */
static enum kind kind_of(uint32_t word) {
    unsigned group = word >> 25 & 15;
    if ((group & 5) == 4) return MEMORY;
    if ((group & 7) == 7) return VECTOR;
    return OTHER;
}

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
    uint64_t found[KINDS] = {0};
    for (size_t n = 0; n < qemu_plugin_tb_n_insns(block); n++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, n)), sizeof word);
        found[kind_of(word)]++;
    }
    for (int kind = 0; kind < KINDS; kind++)
        if (found[kind]) qemu_plugin_register_vcpu_tb_exec_inline(block, INLINE_ADD_U64, &counted[kind], found[kind]);
}

static void called(qemu_plugin_id_t id, unsigned cpu, int64_t number, uint64_t mark, uint64_t b, uint64_t c, uint64_t d,
                   uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
    if (number != MARK) return;
    fprintf(stderr, "LFM %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", mark, counted[VECTOR], counted[MEMORY], counted[OTHER]);
    memset(counted, 0, sizeof counted);
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info_t *info, int argc, char **argv) {
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
