// guest_check_registers(rdi: before, rsi: after, rdx: action, rcx: level): see registers.rs.
// Offsets are those of `State`.
.pushsection .text
.globl guest_check_registers
.type guest_check_registers, @function
guest_check_registers:
    push rbp
    push rbx
    push r12
    push r13
    push r14
    push r15
    push rcx                        // for the end: the level
    push rsi                        // and where the values go

    // Vectors first: afterwards every general register is taken.
    cmp rcx, 1
    jb 21f
    je 22f
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    vmovdqu64 zmm\n, [rdi + 0x100 + 64 * \n]
    .endr
    .irp n, 1, 2, 3, 4, 5, 6, 7
    kmovq k\n, qword ptr [rdi + 0xc0 + 8 * \n]
    .endr
    jmp 23f
22:
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovdqu ymm\n, [rdi + 0x100 + 64 * \n]
    .endr
    jmp 23f
21:
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movups xmm\n, [rdi + 0x100 + 64 * \n]
    .endr
23:
    ldmxcsr [rdi + 0x94]
    fldcw [rdi + 0x90]
    fld qword ptr [rdi + 0x88]

    // The action's address is where `ret` goes when all is loaded.
    lea rax, [rip + 30f]
    cmp rdx, 1
    jb 29f
    lea rax, [rip + 31f]
    je 29f
    lea rax, [rip + 32f]
    cmp rdx, 3
    jb 29f
    lea rax, [rip + 33f]
    je 29f
    lea rax, [rip + 34f]
29:
    push rax
    push qword ptr [rdi + 0x80]
    mov rax, [rdi + 0x0]
    mov rcx, [rdi + 0x8]
    mov rdx, [rdi + 0x10]
    mov rbx, [rdi + 0x18]
    mov rbp, [rdi + 0x28]
    mov rsi, [rdi + 0x30]
    mov r8, [rdi + 0x40]
    mov r9, [rdi + 0x48]
    mov r10, [rdi + 0x50]
    mov r11, [rdi + 0x58]
    mov r12, [rdi + 0x60]
    mov r13, [rdi + 0x68]
    mov r14, [rdi + 0x70]
    mov r15, [rdi + 0x78]
    mov rdi, [rdi + 0x38]
    popfq
    ret

30: // store
    mov [rsi], rax
    jmp 40f
31: // load
    mov rax, [rsi]
    jmp 40f
32: // loop, without a change of the flags
    jrcxz 40f
    lea rcx, [rcx - 1]
    jmp 32b
33: // system call
    syscall
    jmp 40f
34: // string operation
    rep movsb

40:
    pushfq
    xchg rdi, [rsp + 8]             // where the values go; RDI is kept there
    mov [rdi + 0x0], rax
    mov [rdi + 0x8], rcx
    mov [rdi + 0x10], rdx
    mov [rdi + 0x18], rbx
    mov [rdi + 0x28], rbp
    mov [rdi + 0x30], rsi
    mov [rdi + 0x40], r8
    mov [rdi + 0x48], r9
    mov [rdi + 0x50], r10
    mov [rdi + 0x58], r11
    mov [rdi + 0x60], r12
    mov [rdi + 0x68], r13
    mov [rdi + 0x70], r14
    mov [rdi + 0x78], r15
    pop qword ptr [rdi + 0x80]
    cld
    pop qword ptr [rdi + 0x38]
    stmxcsr [rdi + 0x94]
    fnstcw [rdi + 0x90]
    fstp qword ptr [rdi + 0x88]
    pop rcx
    cmp rcx, 1
    jb 51f
    je 52f
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    vmovdqu64 [rdi + 0x100 + 64 * \n], zmm\n
    .endr
    .irp n, 1, 2, 3, 4, 5, 6, 7
    kmovq qword ptr [rdi + 0xc0 + 8 * \n], k\n
    .endr
    vzeroupper
    jmp 53f
52:
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovdqu [rdi + 0x100 + 64 * \n], ymm\n
    .endr
    vzeroupper
    jmp 53f
51:
    .irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    movups [rdi + 0x100 + 64 * \n], xmm\n
    .endr
53:
    // As C has them.
    fninit
    push 0x1f80
    ldmxcsr [rsp]
    pop rax
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbx
    pop rbp
    ret
.size guest_check_registers, . - guest_check_registers
.popsection
