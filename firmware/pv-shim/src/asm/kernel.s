# Where the kernel, and the shim itself, enter: page faults and interrupts.

# ---- Page fault of the kernel, or of the shim. R11: address, stack: none yet.
.globl pv_shim_landing_kernel_fault
pv_shim_landing_kernel_fault:
  mov %rax, f_rax(%rip)
  mov %rcx, f_rcx(%rip)
  COUNT 7
  testb $1, kf(%rip)
  jz kernel_fault
  # Present: the kernel made an entry without the user bit, which its ring
  # needs. All of the table get it.
  cmpb $0, kernel_mode(%rip)
  je kernel_fault
  mov %rdx, scratch_fault(%rip)
  mov %rsi, scratch_fault + 8(%rip)
  mov %rdi, scratch_fault + 16(%rip)
  xor %esi, %esi
  mov kernel_cr3(%rip), %rax
  mov $39, %ecx
1: cmp memory(%rip), %rax
  jae 6f
  movabs ${DIRECT_MAP}, %rdx
  add %rax, %rdx
  mov %r11, %rax
  shr %cl, %rax
  and $511, %eax
  lea (%rdx, %rax, 8), %rdi
  mov (%rdi), %rax
  test $1, %al
  jz 6f
  test $4, %al
  jnz 4f
  inc %esi
  mov $512, %eax
2: mov (%rdx), %edi
  and $5, %edi
  cmp $1, %edi
  jne 3f
  orq $4, (%rdx)
3: add $8, %rdx
  dec %eax
  jnz 2b
  sub $4096, %rdx
  mov %r11, %rax
  shr %cl, %rax
  and $511, %eax
  mov (%rdx, %rax, 8), %rax
4: cmp $12, %ecx
  je 6f
  cmp $39, %ecx
  je 5f
  test $0x80, %al
  jnz 6f
5: movabs $0x000ffffffffff000, %rdx
  and %rdx, %rax
  sub $9, %ecx
  jmp 1b
6: mov %esi, %eax
  mov scratch_fault(%rip), %rdx
  mov scratch_fault + 8(%rip), %rsi
  mov scratch_fault + 16(%rip), %rdi
  test %eax, %eax
  jz kernel_fault
  COUNT 8
  mov f_rax(%rip), %rax
  mov f_rcx(%rip), %rcx
  mov f_r11(%rip), %r11
  lea kf + 8(%rip), %rsp
  iretq
# The jump of a hypercall found no base of GS: Linux sets it by a hypercall.
jump_fault:
  mov f_rax(%rip), %rax
  mov f_r11(%rip), %r11
  mov kf + 32(%rip), %rsp
  jmp pv_shim_jumped
kernel_fault:
  mov kf + 8(%rip), %rax
  cmp %rax, jumps_from(%rip)
  je jump_fault
  lea pv_shim_start(%rip), %rcx
  sub %rcx, %rax
  cmp ${CODE_SIZE} + 0x1000, %rax
  jb shim_fault
  mov %r11, %rcx
  mov vcpu_info(%rip), %rax
  mov %rcx, 16(%rax)
  mov f_rax(%rip), %rax
  mov %rax, c_rax(%rip)
  mov f_rcx(%rip), %rax
  mov %rax, c_rcx(%rip)
  mov f_r11(%rip), %rax
  mov %rax, c_r11(%rip)
  mov kf(%rip), %rax
  cmpb $0, kernel_mode(%rip)
  jne 1f
  or $4, %eax                        # user code, in a shared view
  mov %rax, c_error(%rip)
  lea kf + 8(%rip), %rcx
  FRAME
  USER_SEGMENTS
  jmp 2f
1: and $~4, %eax
  mov %rax, c_error(%rip)
  lea kf + 8(%rip), %rcx
  FRAME
  movq ${KERNEL_CS}, c_cs(%rip)
  movq ${KERNEL_SS}, c_ss(%rip)
2: mov fault_handler(%rip), %rax
  mov %rax, c_handler(%rip)
  movw $0x101, c_has_error(%rip)
  mov c_error(%rip), %eax
  and $7, %eax
  cmp $3, %eax                       # the kernel wrote to a present page
  jne deliver
  mov vcpu_info(%rip), %rax
  cmpq $0, 16(%rax)                  # of its own
  jns deliver
  mov c_rsp(%rip), %rsp
  CALL 5
  jmp deliver
# A fault of the shim itself: in a hypercall it is the guest's bad address.
shim_fault:
  mov kf + 8(%rip), %rax
  lea pv_shim_start(%rip), %r11
  sub %r11, %rax
  cmp $(pv_shim_entry - pv_shim_start), %rax
  jb 1f
  cmp $(h_iret - pv_shim_start), %rax
  jae 1f
  mov kf + 32(%rip), %rsp
  jmp bad_address
1: CALL 2
  ud2

# ---- Interrupts of the kernel and of the shim, on the stack of either. They
# may come anywhere in here too: KVM delivers one again if the first thing that
# its handler does is a fault that KVM resolves (on the stack, say), even if the
# local APIC was told meanwhile that it is done.
.macro SAVE
  push %rax
  push %rcx
  push %r11
.endm
# Goes on with the context that the interrupted one returns to. It is not part
# of what begins again, as the stack changes.
interrupt_next:
  mov (%rsp), %r11
  mov 8(%rsp), %rcx
  mov 16(%rsp), %rax
  mov 48(%rsp), %rsp
  SAVE
  jmp interrupt_look
.globl pv_shim_timer
pv_shim_timer:
  SAVE
  RAISE_TIMER
  jmp 1f
.globl pv_shim_event
pv_shim_event:
  SAVE
1: COUNT 9
  cmpb $0, flush(%rip)
  je interrupt_look
  movzwl idt + 48(%rip), %eax        # a door may be open
  push %rax
  push stack + {DOOR}(%rip)          # and its frame in use
  push stack + {DOOR} + 24(%rip)
  movb $0, flush(%rip)
  FLUSH
  pop stack + {DOOR} + 24(%rip)
  pop stack + {DOOR}(%rip)
  pop %rax
  movw %ax, idt + 48(%rip)
interrupt_look:                      # stack: R11, RCX, RAX, frame
  mov 24(%rsp), %rax
  lea pv_shim_start(%rip), %rcx
  sub %rcx, %rax
  cmp ${CODE_SIZE} + 0x1000, %rax
  jb interrupt_shim
  mov vcpu_info(%rip), %rax
  cmpw $1, (%rax)
  jne interrupt_tail
  mov (%rsp), %rax
  mov %rax, c_r11(%rip)
  mov 8(%rsp), %rax
  mov %rax, c_rcx(%rip)
  mov 16(%rsp), %rax
  mov %rax, c_rax(%rip)
  lea 24(%rsp), %rcx
  FRAME
  movq ${KERNEL_CS}, c_cs(%rip)
  movq ${KERNEL_SS}, c_ss(%rip)
  movl $0, apic_eoi(%rip)
interrupt_upcall:
  jmp upcall
# In the shim: it looks at the events itself, before it leaves; one that has
# looked already looks again.
interrupt_shim:
  # Right before the end of this very routine, or of the kernel's return: the
  # context that they return to is looked at. (The frame of this interrupt may
  # lie over what was on the stack.)
  cmp $(interrupt_go - pv_shim_start), %rax
  je interrupt_next
  cmp $(interrupt_done - pv_shim_start), %rax
  je interrupt_next
  cmp $(iret_kernel_go - pv_shim_start), %rax
  je interrupt_next
  lea interrupt_look(%rip), %rcx
  cmp $(interrupt_done - pv_shim_start), %rax
  jae interrupt_tail
  cmp $(interrupt_upcall - pv_shim_start), %rax
  je interrupt_tail
  cmp $(interrupt_look - pv_shim_start), %rax
  jae 5f
  lea leave(%rip), %rcx
  cmp $(leave_end - pv_shim_start), %rax
  jae 1f
  cmp $(leave_check - pv_shim_start), %rax
  jb interrupt_tail
  jmp 5f
1: lea iret_kernel(%rip), %rcx
  cmp $(iret_kernel_end - pv_shim_start), %rax
  jae 3f
  cmp $(iret_kernel_check - pv_shim_start), %rax
  jb interrupt_tail
  jmp 5f
3: lea iret_user(%rip), %rcx
  cmp $(iret_trusted_end - pv_shim_start), %rax
  jae 4f
  cmp $(iret_user_check - pv_shim_start), %rax
  jb interrupt_tail
  movb $1, kernel_mode(%rip)
  jmp 5f
4: lea user_again(%rip), %rcx
  cmp $(user_again_end - pv_shim_start), %rax
  jae interrupt_tail
  cmp $(user_again - pv_shim_start), %rax
  jb interrupt_tail
5: mov %rcx, 24(%rsp)
interrupt_tail:
  mov (%rsp), %r11
  mov 8(%rsp), %rcx
  mov 16(%rsp), %rax
  lea 24(%rsp), %rsp
interrupt_done:
  movl $0, apic_eoi(%rip)
interrupt_go:
  iretq
.org {ENTRY}
  jmp pv_shim_entry
.globl pv_shim_end
pv_shim_end:

# ---- What user code's view shows where `syscall` arrives.
.globl pv_shim_user_entry
pv_shim_user_entry:
  int3
  nop
  mov %rcx, %r11                     # back from a system call: see d_sysreturn
  jmp *%rcx
.globl pv_shim_user_entry_end
pv_shim_user_entry_end:
.text
