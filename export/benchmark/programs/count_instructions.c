/* Counts the instructions that a program for aarch64 executes, by kind, as a plugin of qemu's user mode (plugin API 1:
 * QEMU 6.0 to 8.2). No Debian package has qemu-plugin.h: what is needed of it is declared below, after
 * https://www.qemu.org/docs/master/devel/tcg-plugins.html
 *
 *   qemu-aarch64 -plugin count_instructions.so,out=COUNTS ...
 *
 * The program calls prctl(MARK) wherever the counts so far are to be written: a line of numbers, one of each kind.
 * -DKINDS={mask, value}, ...  An instruction is of the first kind with (instruction & mask) == value.
 * Counts of several threads are not exact: their additions are not atomic.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MARK 0x5EC0 /* an option that prctl does not have */

typedef uint64_t qemu_plugin_id_t;
typedef struct {
    const char *target_name;
    struct { int min, cur; } version;
    bool system_emulation;
    struct { int smp_vcpus, max_vcpus; } system;
} qemu_info_t;
struct qemu_plugin_tb; /* a block of instructions that are executed one after the other */
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
typedef void on_block(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void on_call(qemu_plugin_id_t, unsigned int cpu, int64_t number, uint64_t, uint64_t, uint64_t, uint64_t,
                     uint64_t, uint64_t, uint64_t, uint64_t);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, on_block *);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, on_call *);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum qemu_plugin_op, void *, uint64_t);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
EXPORT int qemu_plugin_version = 1;

static const struct { uint32_t mask, value; } kinds[] = {KINDS};
enum { NUMBER_OF_KINDS = sizeof kinds / sizeof *kinds };
static uint64_t counts[NUMBER_OF_KINDS];
static FILE *out;

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
    uint64_t here[NUMBER_OF_KINDS] = {0};
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(block); i++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(block, i)), sizeof word);
        for (int kind = 0; kind < NUMBER_OF_KINDS; kind++)
            if ((word & kinds[kind].mask) == kinds[kind].value) {
                here[kind]++;
                break;
            }
    }
    for (int kind = 0; kind < NUMBER_OF_KINDS; kind++)
        if (here[kind])
            qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &counts[kind], here[kind]);
}

static void called(qemu_plugin_id_t id, unsigned int cpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3,
                   uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
    if (number != 167 || a1 != MARK) /* prctl's number on aarch64 */
        return;
    for (int kind = 0; kind < NUMBER_OF_KINDS; kind++)
        fprintf(out, "%" PRIu64 "%c", counts[kind], kind + 1 < NUMBER_OF_KINDS ? ' ' : '\n');
    fflush(out);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *qemu, int argc, char **argv) {
    if (argc != 1 || strncmp(argv[0], "out=", 4) || strcmp(qemu->target_name, "aarch64"))
        return -1;
    if (!(out = fopen(argv[0] + 4, "w")))
        return -1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
