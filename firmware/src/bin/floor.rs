//! The least that system calls, page faults and address spaces can cost a
//! guest whose kernel runs in ring 3, in address spaces of its own.
//!
//! A guest without a real kernel: user code, and beside it a kernel that does
//! for each system call and page fault no more than change the address space,
//! write the page table entry and go back. Both run in ring 3; ring 0 has a few
//! instructions where a page table is loaded. User code cannot fool them:
//! what they load comes from memory that only the kernel's address space lets
//! ring 3 write.
//!
//! Its parts lie at fixed addresses (see `floor.ld`). Whoever starts it maps
//! them so (`U`: in the address spaces of user code, `K`: in the kernel's; `s`:
//! supervisor only):
//!
//! | address | U | K | what |
//! |---|---|---|---|
//! | 0 | - | yes | page tables: 0x1000 and 0xa000 the kernel's, 0x5000 and 0xb000 the user code's, 0xd000 third, 0xe000 second and 0x9000 first level of the first window; from 0x10000 on eleven empty pages |
//! | 0x200000 | yes | yes | user code and, from 0x210000 on, its results |
//! | 0x400000 | s | yes | descriptors and stacks of ring 0: other memory in U and in K |
//! | 0x800000 | - | yes | those of U |
//! | 0xa00000 | s | yes | code of ring 0 |
//! | 0xc00000 | - | yes | the kernel, and its stack |
//! | 0xe00000 | yes | - | where `syscall` arrives |
//! | 1 << 39 | yes | yes | a window of 2 MiB: no pages |
//! | 1 << 40 | yes | yes | another: no tables either |
//! | 3 << 39 to 6 << 39 | - | of operation 4 | as from address 0 on |
//!
//! On the pages at 0x400000: the interrupt descriptors, at 0x8000 the stacks.
//! The first (top 0x8400) takes `int3`, the second (0x8600) the page faults of
//! user code, the third (0x8800) `int3` of the kernel; where the first two
//! leave their frames, the kernel's page has frames to 0xc00000 and 0xc00008
//! (the second one word lower: r11 lies there).
//!
//! It starts at its ELF entry with
//!
//! | register | meaning |
//! |---|---|
//! | rdi | what to do: 0 system calls, 1 page faults, 2 mapping one page, 3 switching between two processes and back, 4 an address space, 5 flushes, 6 flushes of an address, 7 exits |
//! | rsi | batches |
//! | r12 | how often in each batch; of page faults 512 at most |
//! | r13 | where the duration of each batch goes, in ticks: 8 bytes |
//!
//! and writes to port 0xf1 at the end, to port 0xee when something is wrong, to
//! port 0xf2 for each exit (whose durations it does not take).
#![no_std]
#![no_main]

use core::arch::global_asm;

use blanket_firmware as _;

global_asm!(
    r#"
.set VIEW, 0x400000
.set OTHER, 0x800000
.set DOOR, 0x83d8
.set FAULT, 0x85c8
.set BACK, 0x87d8
.set STACK, 0xd00000
.set WINDOW, 1 << 39
.set DISTANT, 1 << 40

# ---- User code.
.section .floor.user, "ax"
.globl floor_user
floor_user:
    jmp *operations(, %rdi, 8)
.balign 8
operations:
    .quad system_calls, page_faults, one_page, two_processes, address_space
    .quad flushes, invalidations, exits
.macro CALL number
    mov $\number, %eax
    syscall
.endm
.macro START
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    mov %rax, %r14
    mov %r12, %rbx
2:
.endm
.macro END again
    dec %rbx
    jnz 2b
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    sub %r14, %rax
    mov %rax, (%r13)
    add $8, %r13
    dec %rsi
    jnz \again
    CALL 6
.endm
system_calls:
    START
    CALL 0
    END system_calls
page_faults:
    CALL 1
    movabs $WINDOW, %r15
    START
    movb $1, (%r15)
    add $4096, %r15
    END page_faults
one_page:
    movabs $DISTANT, %r15
    START
    CALL 0
    movb $1, (%r15)
    CALL 2
    END one_page
two_processes:
    START
    CALL 0
    CALL 3
    CALL 0
    CALL 3
    END two_processes
address_space:
    movabs $WINDOW, %r15
    START
    CALL 4
    movb $1, (%r15)
    movb $1, (%r15, %r15)
    CALL 5
    END address_space
flushes:
    START
    CALL 7
    END flushes
invalidations:
    START
    CALL 8
    END invalidations
exits:
    mov %r12, %rbx
2:  out %al, $0xf2
    dec %rbx
    jnz 2b
    dec %rsi
    jnz exits
    CALL 6

# ---- Where `syscall` arrives: in user code's view only.
.section .floor.entry, "ax"
floor_entry:
    int3
    mov %rcx, %r11
    jmp *%rcx

# ---- Ring 0.
.section .floor.gates, "awx"
# From user code: int3, page fault, anything else.
.balign 16
    movabs $0x1000, %r11
    mov %r11, %cr3
    iretq
.balign 64
    push %r11
    movabs $0x1000, %r11
    mov %r11, %cr3
    mov %cr2, %r11
    iretq
.balign 64
    out %al, $0xee
    iretq
# From the kernel: to user code with r11 lost, or kept (patched in); stores;
# another address space.
.balign 64
gate_return:
    mov %r11, %cr3
    iretq
.balign 64
gate_return_all:
    mov %r11, %cr3
    movabs $0, %r11
    iretq
.balign 64
gate_store:
    mov %rsi, (%rdi)
    sysretq
.balign 64
gate_load:
    mov %rax, %cr3
    sysretq
.balign 64
gate_invalidate:
    invlpg (%rdi)
    sysretq

# ---- The kernel.
.section .floor.kernel, "awx"
    jmp kernel_call
.balign 8
    jmp kernel_fault
.balign 8
calls:
    .quad call_nothing, call_reset, call_unmap, call_switch, call_build, call_drop, call_end
    .quad call_flush, call_invalidate
hypercalls:
    .quad hypercall_return, hypercall_return_all, hypercall_store, hypercall_load
    .quad hypercall_invalidate
kernel_cr3: .quad 0x1000
user_cr3: .quad 0x5000
user_rip: .quad 0
returns_to: .quad 0
stack: .quad 0
.macro HYPERCALL
    mov $6f, %ecx
    jmp *hypercalls(, %rax, 8)
6:
.endm
.macro GATE name
    movw $(\name - 0xa00000), VIEW + 3 * 16
.endm

# System call: rcx is where it returns to, rax its number.
kernel_call:
    cmpq $floor_entry + 1, OTHER + DOOR
    jne bad
    mov %rcx, user_rip
    jmp *calls(, %rax, 8)
bad:
    out %al, $0xee
call_reset:
    mov $0x9000, %edi
    mov $512, %ecx
    xor %eax, %eax
    rep stosq
    jmp call_nothing
call_unmap:
    movq $0, 0x1a000
    movq $0, 0x19000
    movq $0, 0x18000
    movq $0, 0x1010
    movq $0, 0x5010
    jmp call_nothing
call_flush:
    mov kernel_cr3, %rdi
    mov $3, %eax
    HYPERCALL
    jmp call_nothing
call_invalidate:
    movabs $WINDOW, %rdi
    mov $4, %eax
    HYPERCALL
    jmp call_nothing
call_switch:
    mov kernel_cr3, %rax
    xor $0x1000 ^ 0xa000, %rax
    mov user_cr3, %rdi
    xor $0x5000 ^ 0xb000, %rdi
    jmp switch
# Top table of user code and kernel, and three levels below for each window.
call_build:
    mov 0x5000, %rax
    mov %rax, 0x10000
    mov 0x1000, %rax
    mov %rax, 0x14000
    mov %rax, 0x14018
    mov %rax, 0x14020
    mov %rax, 0x14028
    mov %rax, 0x14030
    movq $0x11067, 0x10008
    movq $0x11067, 0x14008
    movq $0x12067, 0x11000
    movq $0x13067, 0x12000
    movq $0x1800067, 0x13000
    movq $0x15067, 0x10010
    movq $0x15067, 0x14010
    movq $0x16067, 0x15000
    movq $0x17067, 0x16000
    movq $0x1800067, 0x17000
    mov $0x14000, %eax
    mov $0x10000, %edi
    jmp switch
call_drop:
    movq $0, 0x13000
    movq $0, 0x12000
    movq $0, 0x11000
    movq $0, 0x10008
    movq $0, 0x14008
    movq $0, 0x17000
    movq $0, 0x16000
    movq $0, 0x15000
    movq $0, 0x10010
    movq $0, 0x14010
    mov $0x1000, %eax
    mov $0x5000, %edi
switch:
    mov %rax, kernel_cr3
    mov %rdi, user_cr3
    mov %rax, 0xa00002
    mov %rax, 0xa00044
    mov %rax, %rdi
    mov $3, %eax
    HYPERCALL
    cmpl $0x14000, kernel_cr3
    jne call_nothing
    # Linux has its code, its stacks, all memory and what it knows of each page
    # in slots of their own.
    .irp slot, 3, 4, 5, 6
    movabs $(\slot << 39) + STACK - 8, %rax
    mov (%rax), %eax
    .endr
call_nothing:
    xor %eax, %eax
    HYPERCALL
call_end:
    out %al, $0xf1
    jmp call_end

# Page fault: r11 is the address.
kernel_fault:
    mov $STACK, %rsp
    push %rax
    push %rcx
    push %rsi
    push %rdi
    mov %r11, %rax
    shr $12, %rax
    bt $28, %rax
    jc distant
    and $511, %eax
    lea 0x9000(, %rax, 8), %rdi
    shl $12, %rax
    lea 0x1800067(%rax), %rsi
    mov $2, %eax
    HYPERCALL
    jmp 3f
distant:
    movq $0x1800067, 0x1a000
    movq $0x1a067, 0x19000
    movq $0x19067, 0x18000
    movq $0x18067, 0x5010
    movq $0x18067, 0x1010
3:  mov $1, %eax
    HYPERCALL

# ---- Hypercalls: rcx is where they return to.
hypercall_return:
    mov OTHER + DOOR + 16, %rax
    mov %rax, OTHER + BACK + 16
    mov OTHER + DOOR + 24, %rax
    mov %rax, OTHER + BACK + 24
    movq $floor_entry + 1, OTHER + BACK
    GATE gate_return
    mov user_rip, %rcx
    mov user_cr3, %r11
    int3
hypercall_return_all:
    mov OTHER + FAULT, %rax
    mov %rax, gate_return_all + 6
    mov OTHER + FAULT + 16, %rax
    mov %rax, OTHER + BACK
    mov OTHER + FAULT + 32, %rax
    mov %rax, OTHER + BACK + 16
    mov OTHER + FAULT + 40, %rax
    mov %rax, OTHER + BACK + 24
    GATE gate_return_all
    pop %rdi
    pop %rsi
    pop %rcx
    pop %rax
    mov user_cr3, %r11
    int3
hypercall_store:
    GATE gate_store
4:  mov %rcx, returns_to
    mov %rsp, stack
    mov $5f, %ecx
    mov $2, %r11d
    int3
5:  mov stack, %rsp
    jmp *returns_to
hypercall_load:
    mov %rdi, %rax
    GATE gate_load
    jmp 4b
hypercall_invalidate:
    GATE gate_invalidate
    jmp 4b
"#,
    options(att_syntax)
);
