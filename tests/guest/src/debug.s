// guest_check_debug(rdi: words): stores 1 to 5 in the first, then this process's number in the
// second.
.pushsection .text
.globl guest_check_debug
.type guest_check_debug, @function
guest_check_debug:
    xor eax, eax
.globl guest_check_debug_target
guest_check_debug_target:
    inc rax
    mov [rdi], rax
.globl guest_check_debug_stored
guest_check_debug_stored:
    cmp rax, 5
    jne guest_check_debug_target
    mov eax, 39
    syscall
.globl guest_check_debug_called
guest_check_debug_called:
    mov [rdi + 8], rax
    ret
.size guest_check_debug, . - guest_check_debug
.popsection
