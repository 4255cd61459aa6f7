// guest_check_try(rdi: code, rsi: argument) -> 0, or the signal that ended it. The code may
// spoil every register; its stack is some way below ours.
.pushsection .text
.globl guest_check_try
.type guest_check_try, @function
guest_check_try:
    push rbp
    push rbx
    push r12
    push r13
    push r14
    push r15
    mov [rip + guest_check_stack], rsp
    mov rax, rdi
    mov rdi, rsi
    xor ecx, ecx
    xor edx, edx
    sub rsp, 4096
    // A system call that does not exist, should this be taken for one.
    push rax
    mov eax, 0xffff
    call [rsp]
    xor eax, eax
// The signal handler comes here, with the signal in EAX.
.globl guest_check_landing
guest_check_landing:
    mov rsp, [rip + guest_check_stack]
    cld
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbx
    pop rbp
    ret
.size guest_check_try, . - guest_check_try

.globl guest_check_load
guest_check_load:
    mov al, [rdi]
    ret
.globl guest_check_store
guest_check_store:
    mov byte ptr [rdi], 0x90
    ret
.globl guest_check_jump
guest_check_jump:
    // Should the code at RDI end like a system call's, it comes back.
    lea rcx, [rip + 2f]
    mov r11d, 0x202
    jmp rdi
2:  ret
.popsection

.pushsection .bss
.balign 8
guest_check_stack: .skip 8
.popsection
