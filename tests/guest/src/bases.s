// guest_check_bases_victim(rdi: rounds) and guest_check_bases_other(rdi: rounds) do not return:
// without a base of FS they have nothing of libc's. The former exits with 1 if it finds a base of
// FS that it has not set, with 2 if of GS, else with 0.
.pushsection .text
.macro NO_BASES
    mov rbx, rdi
    mov eax, 158
    mov edi, 0x1002             // ARCH_SET_FS
    xor esi, esi
    syscall
    mov eax, 158
    mov edi, 0x1001             // ARCH_SET_GS
    xor esi, esi
    syscall
.endm
.macro YIELD
    mov eax, 24
    syscall
.endm
.macro EXIT status
    mov edi, \status
    mov eax, 231
    syscall
.endm
.globl guest_check_bases_victim
guest_check_bases_victim:
    NO_BASES
2:  rdfsbase rax
    test rax, rax
    jnz 3f
    rdgsbase rax
    test rax, rax
    jnz 4f
    YIELD
    dec rbx
    jnz 2b
    EXIT 0
3:  EXIT 1
4:  EXIT 2
.globl guest_check_bases_other
guest_check_bases_other:
    NO_BASES
2:  mov rax, 0x123456789000
    wrfsbase rax
    wrgsbase rax
    YIELD
    dec rbx
    jnz 2b
    EXIT 0
.popsection
