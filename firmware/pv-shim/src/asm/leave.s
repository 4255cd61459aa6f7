# Hypercalls that give the processor away: halts, events, returns.

# Tells the others whether this vCPU runs (0) or is blocked (2). The monitor
# sees to the times. Changes RAX.
.macro RUNSTATE state
  mov runstate(%rip), %rax
  test %rax, %rax
  jz 79f
  movl $\state, (%rax)
79:
.endm

h_sched_op:
  cmp $1, %edi
  ja slow
  jb ok                              # yield: there is nobody else
block:
  mov vcpu_info(%rip), %r11
  movb $0, 1(%r11)
  cmpb $0, (%r11)
  jne ok
  RUNSTATE 2
  mov %rsp, halt_rsp(%rip)
  movb $1, asleep(%rip)
  # On a stack of their own: ring 0's has the frame where user code lands.
  movb $3, idt + 16 * {EVENT_VECTOR} + 4(%rip)
  movb $3, idt + 16 * {TIMER_VECTOR} + 4(%rip)
  GATES pv_shim_wake_event, pv_shim_wake_timer
  mfence
  mov vcpu_info(%rip), %r11
  cmpb $0, (%r11)
  jne woken_now
  DOOR d_halt
.globl pv_shim_woken
pv_shim_woken:
  movb $0, asleep(%rip)
  mov halt_rsp(%rip), %rsp
  movw $(pv_shim_vectors + 24 - pv_shim_start), idt + 48(%rip)
  movl $0, apic_eoi(%rip)
woken_now:
  movb $0, asleep(%rip)
  KERNEL_GATES
  movb $0, idt + 16 * {EVENT_VECTOR} + 4(%rip)
  movb $0, idt + 16 * {TIMER_VECTOR} + 4(%rip)
  cmpb $0, timer_fired(%rip)
  je 1f
  movb $0, timer_fired(%rip)
  RAISE_TIMER
1: mfence                              # asleep is written before flush is read
  cmpb $0, flush(%rip)
  je 2f
  movb $0, flush(%rip)
  FLUSH
2: RUNSTATE 0
  jmp ok

h_event_channel_op:
  cmp $4, %edi                       # send
  jne slow
  mov (%rsi), %eax
  cmp ${EVENT_CHANNELS}, %eax
  jae slow4
  movabs ${DOORBELLS}, %r11
  cmpb $1, (%r11, %rax)
  jne slow4
  mov %rdx, %rcx
  mov ${DOORBELL_PORT}, %edx
.globl pv_shim_doorbell
pv_shim_doorbell:
  out %eax, %dx
.globl pv_shim_rung
pv_shim_rung:
  mov %rcx, %rdx
  jmp ok
slow4:
  mov $32, %eax
  jmp slow

# ---- iret: on the stack RAX, R11, RCX, flags, RIP, CS, RFLAGS, RSP, SS
.globl pv_shim_iret_hypercall
pv_shim_iret_hypercall:
h_iret:
  COUNT 4
iret_again:
  mov vcpu_info(%rip), %rcx
  mov 48(%rsp), %r11
  shr $9, %r11d
  not %r11d
  and $1, %r11d
  mov %r11b, 1(%rcx)
  andq $~0x23000, 48(%rsp)
  orq $0x202, 48(%rsp)
  testb $3, 40(%rsp)
  jnz iret_user
  movq ${LINUX_CODE3}, 40(%rsp)
  movq ${LINUX_DATA3}, 64(%rsp)
iret_kernel:
  mov vcpu_info(%rip), %rcx
iret_kernel_check:
  cmpw $1, (%rcx)
  je iret_kernel_upcall
  mov (%rsp), %rax
  mov 8(%rsp), %r11
  mov 16(%rsp), %rcx
  lea 32(%rsp), %rsp
iret_kernel_go:
  iretq
iret_kernel_end:
iret_kernel_upcall:
  mov (%rsp), %rax
  mov %rax, c_rax(%rip)
  mov 8(%rsp), %rax
  mov %rax, c_r11(%rip)
  mov 16(%rsp), %rax
  mov %rax, c_rcx(%rip)
  mov 32(%rsp), %rax
  mov %rax, c_rip(%rip)
  mov 48(%rsp), %rax
  mov %rax, c_rflags(%rip)
  mov 56(%rsp), %rax
  mov %rax, c_rsp(%rip)
  movq ${KERNEL_CS}, c_cs(%rip)
  movq ${KERNEL_SS}, c_ss(%rip)
  jmp upcall

iret_user:
  mov vcpu_info(%rip), %rcx
iret_user_check:
  cmpw $1, (%rcx)
  je iret_user_upcall
  cmpl ${LINUX_CODE3}, 40(%rsp)
  jne iret_other
iret_user_cs:
  cmpb $0, trusted(%rip)
  jne iret_trusted
  mov 32(%rsp), %rax
  mov %rax, back(%rip)
  mov 40(%rsp), %eax
  mov %rax, back + 8(%rip)
  mov 48(%rsp), %rax
  mov %rax, back + 16(%rip)
  mov 56(%rsp), %rax
  mov %rax, back + 24(%rip)
  mov 64(%rsp), %eax
  mov %rax, back + 32(%rip)
  mov user_gs(%rip), %rax
  wrgsbase %rax
  movb $0, kernel_mode(%rip)
  testb $1, 25(%rsp)                 # VGCF_in_syscall: RCX, R11 are free
  jnz 1f
  mov 8(%rsp), %r11
  mov %r11, imm_return(%rip)
  movw $(d_return - pv_shim_start), idt + 48(%rip)
  mov 16(%rsp), %rcx
  mov (%rsp), %rax
  mov user_cr3(%rip), %r11
  int3
1: movw $(d_sysreturn - pv_shim_start), idt + 48(%rip)
  mov 32(%rsp), %rcx
  lea pv_shim_start + {ENTRY} + 2(%rip), %r11
  mov %r11, back(%rip)
  mov (%rsp), %rax
  mov user_cr3(%rip), %r11
  int3
iret_trusted:
  mov user_gs(%rip), %rax
  wrgsbase %rax
  movb $0, kernel_mode(%rip)
  movl $({CODE0} << 16) + (pv_shim_trusted_event - pv_shim_start), idt + 16 * {EVENT_VECTOR}(%rip)
  movl $({CODE0} << 16) + (pv_shim_trusted_timer - pv_shim_start), idt + 16 * {TIMER_VECTOR}(%rip)
  mov (%rsp), %rax
  mov 8(%rsp), %r11
  mov 16(%rsp), %rcx
  lea 32(%rsp), %rsp
.globl pv_shim_iret_trusted
pv_shim_iret_trusted:
iret_trusted_moved:
  iretq
iret_trusted_end:
iret_other:                          # other segments than Linux's 64-bit ones
  cmpl ${CODE3}, 40(%rsp)
  jne 1f
  movl ${LINUX_CODE3}, 40(%rsp)
  movl ${LINUX_DATA3}, 64(%rsp)
1: jmp iret_user_cs
iret_user_upcall:
  movb $0, kernel_mode(%rip)
  mov user_gs(%rip), %rax
  wrgsbase %rax
  mov (%rsp), %rax
  mov %rax, c_rax(%rip)
  mov 8(%rsp), %rax
  mov %rax, c_r11(%rip)
  mov 16(%rsp), %rax
  mov %rax, c_rcx(%rip)
  mov 32(%rsp), %rax
  mov %rax, c_rip(%rip)
  mov 40(%rsp), %rax
  mov %rax, c_cs(%rip)
  mov 48(%rsp), %rax
  mov %rax, c_rflags(%rip)
  mov 56(%rsp), %rax
  mov %rax, c_rsp(%rip)
  mov 64(%rsp), %rax
  mov %rax, c_ss(%rip)
  jmp upcall
