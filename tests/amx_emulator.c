/* Runs Intel AMX's instructions on a CPU without them.
 *
 * Such a CPU answers each of them with SIGILL. The handler here decodes the instruction at fault,
 * does its work on tiles in this thread's memory, and goes on behind it; every other instruction
 * runs on the CPU. What real hardware refuses (a tile that is not configured, extents that do not
 * fit together, a tile used twice) is said and left to the handler that was there before, which
 * ends the process. After Intel's Software Developer's Manual, volume 2, tables of opcodes and
 * pseudo-code; one fused multiply-add after the other, as there.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>
#include <xmmintrin.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, WORDS = 16 };
enum { FLUSH_DENORMALS = 0x9fc0 }; /* MXCSR: no exceptions, to nearest even, DAZ and FTZ */
enum { NONE, BITS_66, BITS_F3, BITS_F2 }; /* the prefix that VEX stands for */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} Config;

static __thread struct {
    Config config;
    uint8_t tile[TILES][ROWS][ROW_BYTES] __attribute__((aligned(ROW_BYTES)));
} state;

static struct sigaction before;

/* How many of each kind were run, by all threads. */
static struct { uint64_t configures, loads, stores, zeros, products; } counts;

static const int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};

typedef struct {
    int prefix, opcode, reg, rm, vvvv; /* rm: a tile, or -1 with an address */
    uint8_t *address;
    int64_t pitch;
    int length;
} Instruction;

/* Decode a VEX instruction of the map 0F 38; tell whether it is one. */
static int decode(const greg_t *gregs, Instruction *found) {
    const uint8_t *code = (const uint8_t *)gregs[REG_RIP];
    if (code[0] != 0xc4 || (code[1] & 31) != 2 || (code[2] & 0x84)) return 0;
    int high_index = code[1] & 0x40 ? 0 : 8, high_base = code[1] & 0x20 ? 0 : 8;
    int modrm = code[4], mod = modrm >> 6;
    found->prefix = code[2] & 3;
    found->opcode = code[3];
    found->vvvv = ~code[2] >> 3 & 15;
    found->reg = modrm >> 3 & 7;
    found->rm = mod == 3 ? modrm & 7 : -1;
    found->length = 5;
    found->pitch = 0;
    if (mod == 3) return 1;
    int base = (modrm & 7) | high_base;
    int64_t address = 0;
    if ((modrm & 7) == 4) {
        int sib = code[found->length++];
        int index = (sib >> 3 & 7) | high_index;
        base = (sib & 7) | high_base;
        if (index != 4) found->pitch = (int64_t)gregs[REGISTERS[index]] << (sib >> 6);
    }
    int absolute = mod == 0 && (base & 7) == 5, relative = absolute && (modrm & 7) == 5;
    if (!absolute) address = gregs[REGISTERS[base]];
    if (mod == 1) address += (int8_t)code[found->length++];
    if (mod == 2 || absolute) {
        int32_t displacement;
        memcpy(&displacement, code + found->length, 4);
        address += displacement;
        found->length += 4;
    }
    if (relative) address += gregs[REG_RIP] + found->length;
    found->address = (uint8_t *)address;
    return 1;
}

static int refuse(const char *why) {
    static const char name[] = "amx_emulator: ";
    if (write(2, name, sizeof name - 1) < 0 || write(2, why, strlen(why)) < 0) return 0;
    return 0;
}

static int configure(const uint8_t *from) {
    memcpy(&state.config, from, sizeof state.config);
    memset(state.tile, 0, sizeof state.tile);
    if (state.config.palette > 1) return refuse("no such palette\n");
    for (int t = 0; t < TILES; t++)
        if (state.config.rows[t] > ROWS || state.config.row_bytes[t] > ROW_BYTES)
            return refuse("a tile is too large\n");
    __atomic_add_fetch(&counts.configures, 1, __ATOMIC_RELAXED);
    return 1;
}

static int usable(int tile) {
    int is = tile < TILES && state.config.palette && state.config.rows[tile]
             && state.config.row_bytes[tile];
    return is ? 1 : refuse("a tile is not configured\n");
}

static int move(const Instruction *i, int is_load) {
    if (!usable(i->reg)) return 0;
    int rows = state.config.rows[i->reg], bytes = state.config.row_bytes[i->reg];
    if (is_load) memset(state.tile[i->reg], 0, sizeof state.tile[i->reg]);
    for (int row = 0; row < rows; row++) {
        uint8_t *there = i->address + row * i->pitch, *here = state.tile[i->reg][row];
        memcpy(is_load ? here : there, is_load ? there : here, bytes);
    }
    __atomic_add_fetch(is_load ? &counts.loads : &counts.stores, 1, __ATOMIC_RELAXED);
    return 1;
}

/* A row of a tile as vectors of the compiler's. */
typedef uint32_t Words __attribute__((vector_size(ROW_BYTES)));
typedef int32_t Integers __attribute__((vector_size(ROW_BYTES)));
typedef float Floats __attribute__((vector_size(ROW_BYTES)));

/* One byte of each word as int32. */
static inline Integers bytes_of(Words words, int byte, int is_signed) {
    Words top = words << (24 - 8 * byte);
    return is_signed ? (Integers)top >> 24 : (Integers)(top >> 24);
}

/* One bfloat16 of each word. */
static inline Floats halves_of(Words words, int half) {
    return (Floats)(half ? words & 0xffff0000u : words << 16);
}

/* Products of bytes, each signed or not, added to int32 without saturation. */
static inline void multiply_bytes(
    Integers *c, const Words *a, const Words *b, int rows, int depth, int a_signed, int b_signed) {
    for (int m = 0; m < rows; m++)
        for (int byte = 0; byte < 4; byte++) {
            Integers left = bytes_of(a[m], byte, a_signed);
            for (int k = 0; k < depth; k++) c[m] += left[k] * bytes_of(b[k], byte, b_signed);
        }
}

/* Products of bfloat16: those of even and of odd elements are summed apart, and added last. */
static void multiply_bf16(Floats *c, const Words *a, const Words *b, int rows, int depth) {
    for (int m = 0; m < rows; m++) {
        Floats sums[2] = {{0}, {0}};
        for (int half = 0; half < 2; half++) {
            Floats left = halves_of(a[m], half);
            for (int k = 0; k < depth; k++) sums[half] += left[k] * halves_of(b[k], half);
        }
        c[m] += sums[0] + sums[1];
    }
}

static int multiply(const Instruction *i) {
    int c = i->reg, a = i->rm, b = i->vvvv;
    const Config *config = &state.config;
    if (a < 0 || !usable(c) || !usable(a) || !usable(b)) return 0;
    if (c == a || c == b || a == b) return refuse("one tile is used twice\n");
    int rows = config->rows[c], depth = config->row_bytes[a] / 4;
    if (config->rows[a] != rows || config->rows[b] != depth
        || config->row_bytes[b] != config->row_bytes[c] || config->row_bytes[a] % 4)
        return refuse("extents of tiles do not fit together\n");
    __atomic_add_fetch(&counts.products, 1, __ATOMIC_RELAXED);
    void *into = state.tile[c], *x = state.tile[a], *y = state.tile[b];
    if (i->opcode == 0x5c) {
        if (i->prefix != BITS_F3) return refuse("this product is not known\n");
        multiply_bf16(into, x, y, rows, depth);
        return 1;
    }
    switch (i->prefix) { /* constants, so that each becomes a loop of its own */
    case NONE: multiply_bytes(into, x, y, rows, depth, 0, 0); break;
    case BITS_66: multiply_bytes(into, x, y, rows, depth, 0, 1); break;
    case BITS_F3: multiply_bytes(into, x, y, rows, depth, 1, 0); break;
    case BITS_F2: multiply_bytes(into, x, y, rows, depth, 1, 1); break;
    }
    return 1;
}

/* Do what an instruction says; tell whether that is AMX's and allowed. */
static int run(const Instruction *i) {
    switch (i->opcode) {
    case 0x49:
        if (i->prefix == BITS_F2 && i->rm == 0) {
            if (!usable(i->reg)) return 0;
            memset(state.tile[i->reg], 0, sizeof state.tile[i->reg]);
            __atomic_add_fetch(&counts.zeros, 1, __ATOMIC_RELAXED);
            return 1;
        }
        if (i->prefix != NONE) return 0;
        if (i->rm < 0) return configure(i->address);
        memset(&state.config, 0, sizeof state.config); /* tilerelease */
        return 1;
    case 0x4b:
        if (i->rm >= 0 || i->prefix == NONE) return 0;
        return move(i, i->prefix != BITS_F3);
    case 0x5c:
    case 0x5e:
        return multiply(i);
    }
    return 0;
}

static void handle(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info;
    greg_t *gregs = ((ucontext_t *)context)->uc_mcontext.gregs;
    Instruction instruction;
    _mm_setcsr(FLUSH_DENORMALS); /* the return restores it */
    if (decode(gregs, &instruction) && run(&instruction))
        gregs[REG_RIP] += instruction.length;
    else
        sigaction(SIGILL, &before, NULL); /* the instruction fails again, and ends the process */
}

/* Run AMX's instructions from now on, in all threads. */
int amx_install(void) {
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
    return sigaction(SIGILL, &action, &before);
}

/* Copy out how many were run: configures, loads, stores, zeros, products. */
void amx_counts(uint64_t *out) { memcpy(out, &counts, sizeof counts); }
