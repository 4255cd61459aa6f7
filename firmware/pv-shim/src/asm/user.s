# Where user code enters: system calls, page faults, interrupts.

# ---- System call of user code. RCX: RIP, R11: RFLAGS.
trusted_syscall:
  mov %rsp, scratch(%rip)
  mov kernel_sp(%rip), %rsp
trusted_switched:
  KERNEL_GATES
trusted_gates:
  push ${LINUX_DATA3}
  push scratch(%rip)
  push %r11
  pushq $0x202                       # the flags are still user code's
  popfq
  jmp 1f
.globl pv_shim_landing_door
pv_shim_landing_door:                # from the user's view; R11 is in CR2
  incq epoch(%rip)
  movw $(pv_shim_vectors + 24 - pv_shim_start), idt + 48(%rip)
  lea pv_shim_start + {ENTRY} + 1(%rip), %r11
  cmp %r11, ud(%rip)
  jne user_breakpoint
  mov kernel_sp(%rip), %rsp
  push ${LINUX_DATA3}
  push ud + 24(%rip)
  mov ud + 16(%rip), %r11
  push %r11
1: push ${LINUX_CODE3}
  push %rcx
  push %r11
  push %rcx
  movb $1, kernel_mode(%rip)
  rdgsbase %rcx
  mov %rcx, user_gs(%rip)
  mov kernel_gs(%rip), %rcx
  wrgsbase %rcx
  mov vcpu_info(%rip), %rcx
  mov syscall_masks(%rip), %r11b
  or %r11b, 1(%rcx)
  COUNT 5
  jmp *syscall_handler(%rip)
user_breakpoint:
  mov %rax, c_rax(%rip)
  mov %rcx, c_rcx(%rip)
  lea ud(%rip), %rcx
  FRAME
  CALL 1
  jmp deliver

# ---- Page fault of user code. R11: address.
.globl pv_shim_landing_fault
pv_shim_landing_fault:
  incq epoch(%rip)
  movw $(pv_shim_vectors + 24 - pv_shim_start), idt + 48(%rip)
  COUNT 6
  mov %rax, c_rax(%rip)
  mov %rcx, c_rcx(%rip)
  mov r11_slot(%rip), %rax
  mov %rax, c_r11(%rip)
  mov vcpu_info(%rip), %rax
  mov %r11, 16(%rax)
  mov uf(%rip), %rax
  or $4, %eax
  mov %rax, c_error(%rip)
  lea uf + 8(%rip), %rcx
  FRAME
  USER_SEGMENTS
  mov fault_handler(%rip), %rax
  mov %rax, c_handler(%rip)
  movw $0x101, c_has_error(%rip)
  jmp deliver

# ---- Interrupts of user code.
# Where it shares the kernel's view. The gates are the kernel's again.
.globl pv_shim_landing_trusted
pv_shim_landing_trusted:
  mov %rax, t_rax(%rip)
  mov %rcx, t_rcx(%rip)
  lea ti(%rip), %rcx
  lea pv_shim_start(%rip), %rax
  sub (%rcx), %rax
  neg %rax
  cmp ${CODE_SIZE} + 0x1000, %rax
  jae interrupt_of_user
  # Before a system call has done anything: it is made again, see below.
  cmp ${ENTRY}, %rax
  jae interrupt_of_user
  cmp $(pv_shim_entry - pv_shim_start), %rax
  jb 1f
  cmp $(entry_of_kernel - pv_shim_start), %rax
  jb interrupt_of_user
1: cmp $(trusted_syscall - pv_shim_start), %rax
  jb 3f
  cmp $(trusted_gates - pv_shim_start), %rax
  jae 3f
  cmp $(trusted_switched - pv_shim_start), %rax
  jb interrupt_of_user
  mov scratch(%rip), %rax
  mov %rax, 24(%rcx)
  jmp interrupt_of_user
3: # On the way out: that begins again.
  cmp $(iret_user - pv_shim_start), %rax
  jb 5f
  cmp $(iret_trusted_end - pv_shim_start), %rax
  jae 4f
  cmp $(iret_trusted_moved - pv_shim_start), %rax
  jb 2f
  subq $32, 24(%rcx)
2: movb $1, kernel_mode(%rip)
  lea iret_user(%rip), %rax
  mov %rax, (%rcx)
  jmp 5f
4: cmp $(user_again - pv_shim_start), %rax
  jb 5f
  cmp $(user_again_end - pv_shim_start), %rax
  jae 5f
  mov %rsp, 24(%rcx)
  lea user_again(%rip), %rax
  mov %rax, (%rcx)
5: # In the shim: as if a gate of the kernel's had been there.
  mov 24(%rcx), %rsp
  and $~15, %rsp
  push 32(%rcx)
  push 24(%rcx)
  push 16(%rcx)
  push 8(%rcx)
  push (%rcx)
  mov t_rax(%rip), %rax
  mov t_rcx(%rip), %rcx
  mov r11_slot(%rip), %r11
  cmpb $0, timer_fired(%rip)
  je pv_shim_event
  movb $0, timer_fired(%rip)
  jmp pv_shim_timer
interrupt_of_user:
  mov t_rax(%rip), %rax
  mov %rax, c_rax(%rip)
  mov t_rcx(%rip), %rax
  mov %rax, c_rcx(%rip)
  jmp 1f
.globl pv_shim_landing_event
pv_shim_landing_event:
  mov %rax, c_rax(%rip)
  mov %rcx, c_rcx(%rip)
  lea ui(%rip), %rcx
1: movw $(pv_shim_vectors + 24 - pv_shim_start), idt + 48(%rip)
  incq epoch(%rip)
  COUNT 9
  FRAME
  USER_SEGMENTS
  # Within a system call's way in, before anything was done: it is made again,
  # perhaps on another vCPU. Within its way out: that is over.
  lea pv_shim_start(%rip), %rcx
  sub c_rip(%rip), %rcx
  neg %rcx
  cmp ${CODE_SIZE} + 0x1000, %rcx
  jae 3f
  mov c_rcx(%rip), %rax
  cmp ${ENTRY} + 1, %rcx
  ja 2f
  sub $2, %rax
2: mov %rax, c_rip(%rip)
3:
  mov r11_slot(%rip), %rax
  mov %rax, c_r11(%rip)
  cmpb $0, timer_fired(%rip)
  je 1f
  movb $0, timer_fired(%rip)
  RAISE_TIMER
1: cmpb $0, flush(%rip)
  je 1f
  movb $0, flush(%rip)
  FLUSH
1: movl $0, apic_eoi(%rip)
user_again:
  mov vcpu_info(%rip), %rax
  cmpw $1, (%rax)
  je upcall
  cmpb $0, trusted(%rip)
  jne user_again_trusted
  mov c_rip(%rip), %rax
  mov %rax, back(%rip)
  mov c_cs(%rip), %rax
  mov %rax, back + 8(%rip)
  mov c_rflags(%rip), %rax
  mov %rax, back + 16(%rip)
  mov c_rsp(%rip), %rax
  mov %rax, back + 24(%rip)
  mov c_ss(%rip), %rax
  mov %rax, back + 32(%rip)
  mov c_r11(%rip), %rax
  mov %rax, imm_return(%rip)
  movw $(d_return - pv_shim_start), idt + 48(%rip)
  mov c_rcx(%rip), %rcx
  mov c_rax(%rip), %rax
  mov user_cr3(%rip), %r11
  int3
user_again_trusted:
  movl $({CODE0} << 16) + (pv_shim_trusted_event - pv_shim_start), idt + 16 * {EVENT_VECTOR}(%rip)
  movl $({CODE0} << 16) + (pv_shim_trusted_timer - pv_shim_start), idt + 16 * {TIMER_VECTOR}(%rip)
  mov c_rax(%rip), %rax
  mov c_rcx(%rip), %rcx
  mov c_r11(%rip), %r11
  lea c_rip(%rip), %rsp
  iretq
user_again_end:
