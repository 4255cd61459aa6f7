# The shim: what runs between a pv guest's kernel and its processor.
#
# Everything is addressed relative to the instruction pointer: each vCPU has
# its own copy, followed by its own data (see layout.rs). Ring 0 code here is
# as short as can be: where KVM interprets ring 0, each instruction of it costs
# more than all of the rest. The way into it is `int3`, whose gate the shim
# points to what it wants done ("door").

.section .rodata.pv_shim,"a"
.balign 4096
.globl pv_shim_start
pv_shim_start:
.set data, pv_shim_start + {DATA}
.set stack, pv_shim_start + {STACK}
.set user_stack, pv_shim_start + {USER_STACK}
.set idt, pv_shim_start + {IDT}
.set apic_eoi, pv_shim_start + {APIC} + 0xb0
.set vcpus, data + {vcpus}
.set scratch_fault, data + {fault_scratch}

.set kernel_mode, data + {kernel_mode}
.set trusted, data + {trusted}
.set in_multicall, data + {in_multicall}
.set syscall_masks, data + {syscall_masks}
.set timer_fired, data + {timer_fired}
.set flush, data + {flush}
.set epoch, data + {epoch}
.set slow_tables, data + {slow_tables}
.set asleep, data + {asleep}
.set call, data + {call}
.set vcpu_info, data + {vcpu_info}
.set kernel_sp, data + {kernel_sp}
.set kernel_gs, data + {kernel_gs}
.set user_gs, data + {user_gs}
.set syscall_handler, data + {syscall_handler}
.set fault_handler, data + {fault_handler}
.set event_handler, data + {event_handler}
.set kernel_cr3, data + {kernel_cr3}
.set user_cr3, data + {user_cr3}
.set memory, data + {memory}
.set kernel_slot, data + {kernel_slot}
.set direct_slot, data + {direct_slot}
.set user_slot, data + {user_slot}
.set timer_port, data + {timer_port}
.set r11_slot, data + {r11}
.set ret, data + {ret}
.set jumps_return, data + {jumps_return}
.set jumps_from, data + {jumps_from}
.set scratch, data + {scratch}
.set multicall, data + {multicall}
.set context, data + {context}
.set c_rax, context + {c_rax}
.set c_rcx, context + {c_rcx}
.set c_r11, context + {c_r11}
.set c_rip, context + {c_rip}
.set c_cs, context + {c_cs}
.set c_rflags, context + {c_rflags}
.set c_rsp, context + {c_rsp}
.set c_ss, context + {c_ss}
.set c_error, context + {c_error}
.set c_handler, context + {c_handler}
.set c_has_error, context + {c_has_error}
.set c_mask, context + {c_mask}
.set f_rax, data + {fault}
.set f_rcx, f_rax + 8
.set f_r11, f_rax + 16
.set t_rax, data + {trusted_interrupt}
.set t_rcx, t_rax + 8
.set halt_rsp, data + {halt_rsp}
.set forget, data + {forget}
.set forgotten, data + {forgotten}
.set runstate, data + {runstate}
.set set_fs, data + {set_bases}
.set set_gs, set_fs + 8
.set counters, data + {counters}
.set hw_frame, data + {hardware}

.set kf, stack + {KERNEL_FAULT}      # error, rip, cs, rflags, rsp, ss
.set uf, user_stack + {USER_FAULT}
.set ud, user_stack + {USER_DOOR}
.set ui, user_stack + {USER_INTERRUPT}
.set ti, stack + {USER_INTERRUPT}      # where user code shares the view
.set fo, stack + {OTHER}               # exceptions for the monitor
.set back, user_stack + {DOOR}       # frame to return to user code

# ---- Ring 0: exceptions that the monitor handles. Stubs of 8 bytes.
.globl pv_shim_vectors
pv_shim_vectors:
.set i, 0
.rept 32
  .byte 0xe6, i                      # out %al, $i
  iretq
  .balign 8
  .set i, i + 1
.endr

# ---- Ring 0: the doors. RAX or R11 has a page table.
.macro COUNT n
  incq counters + 8 * \n (%rip)
.endm
# Goes through a door; back at the next instruction.
.macro DOOR name
  movw $(\name - pv_shim_start), idt + 48(%rip)
  int3
  movw $(pv_shim_vectors + 24 - pv_shim_start), idt + 48(%rip)
.endm
# Points the gates of interrupts to ring 0 code, or to the shim's handlers.
.macro GATES event, timer
  movl $({CODE0} << 16) + (\event - pv_shim_start), idt + 16 * {EVENT_VECTOR}(%rip)
  movl $({CODE0} << 16) + (\timer - pv_shim_start), idt + 16 * {TIMER_VECTOR}(%rip)
.endm
.macro KERNEL_GATES
  movl $({LINUX_CODE3} << 16) + (pv_shim_event - pv_shim_start), idt + 16 * {EVENT_VECTOR}(%rip)
  movl $({LINUX_CODE3} << 16) + (pv_shim_timer - pv_shim_start), idt + 16 * {TIMER_VECTOR}(%rip)
.endm
# Calls the monitor.
.macro CALL reason
  movq $\reason, call(%rip)
  DOOR d_call
.endm

.balign 16
d_cr3:                               # load RAX; RCX, R11 as for sysretq
  mov %rax, %cr3
  sysretq
.balign 16
d_call:
  out %al, ${CALL_PORT}
.globl pv_shim_iret
pv_shim_iret:
  iretq
.balign 16
.globl pv_shim_return
pv_shim_return:                      # from user code's view, for the monitor
  mov %r11, %cr3
  mov r11_slot(%rip), %r11
  iretq
.balign 16
d_return:                            # to user code, all registers
  mov %r11, %cr3
  .byte 0x49, 0xbb                   # movabs, what R11 is to be
imm_return: .quad 0
.globl pv_shim_iret_user
pv_shim_iret_user:
  iretq
.balign 16
d_sysreturn:                         # to user code, after a system call
  mov %r11, %cr3
.globl pv_shim_iret_syscall
pv_shim_iret_syscall:
  iretq
.balign 16
d_invlpg:                            # address in RAX
  invlpg (%rax)
  sysretq
.balign 16
d_store:                             # RSI to RDI, at once for all who look
  xchg %rsi, (%rdi)
  sysretq
.balign 16
d_forget:                            # eight pages
  lock orw $0, (%rbx)
  lock orw $0, (%rax)
  lock orw $0, (%rdx)
  lock orw $0, (%rsi)
  lock orw $0, (%r8)
  lock orw $0, (%r9)
  lock orw $0, (%r10)
  lock orw $0, (%rdi)
  sysretq
.balign 16
d_halt:
  sti
  hlt
  iretq
.globl pv_shim_wake_event
pv_shim_wake_event:
  lea stack + {WAKE}(%rip), %rsp
  iretq
.globl pv_shim_wake_timer
pv_shim_wake_timer:
  movb $1, timer_fired(%rip)
  lea stack + {WAKE}(%rip), %rsp
  iretq

# ---- Ring 0: gates of user code. The immediates are the kernel's page table.
.balign 16
.globl pv_shim_user_door
pv_shim_user_door:
  mov %r11, %cr2
  .byte 0x49, 0xbb                   # movabs $kernel_cr3, %r11
.globl pv_shim_imm_door
pv_shim_imm_door:
imm_door: .quad 0
  mov %r11, %cr3
  iretq
.balign 16
.globl pv_shim_user_timer
pv_shim_user_timer:
  movb $1, timer_fired(%rip)
.globl pv_shim_user_event
pv_shim_user_event:
  mov %r11, r11_slot(%rip)
  .byte 0x49, 0xbb
.globl pv_shim_imm_event
pv_shim_imm_event:
imm_event: .quad 0
  mov %r11, %cr3
  iretq
# The same where kernel and user code share a view.
.balign 16
.globl pv_shim_trusted_timer
pv_shim_trusted_timer:
  movb $1, timer_fired(%rip)
.globl pv_shim_trusted_event
pv_shim_trusted_event:
  mov %r11, r11_slot(%rip)
  KERNEL_GATES                       # KVM may deliver it again where this lands
  lea stack + {TRUSTED_LANDING}(%rip), %rsp
  iretq
.balign 16
.globl pv_shim_user_fault
pv_shim_user_fault:
  mov %r11, r11_slot(%rip)
  .byte 0x49, 0xbb
.globl pv_shim_imm_fault
pv_shim_imm_fault:
imm_fault: .quad 0
  mov %r11, %cr3
  mov %cr2, %r11
  iretq

# ---- Ring 0: page faults of the kernel.
.balign 16
.globl pv_shim_kernel_fault
pv_shim_kernel_fault:
  mov %r11, f_r11(%rip)
  mov %cr2, %r11
  lea stack + {FAULT_LANDING}(%rip), %rsp
  iretq

# ---- Ring 0: where hardware that raises the privilege arrives from syscall.
.balign 16
.globl pv_shim_hardware_entry
pv_shim_hardware_entry:
  mov %rsp, hw_frame + 24(%rip)
  mov %r11, hw_frame + 16(%rip)
  lea hw_frame(%rip), %rsp
  iretq
# The same from 32-bit code, which AMD's processors have: an invalid opcode.
.balign 16
.globl pv_shim_entry32
pv_shim_entry32:
  mov %rsp, fo + 24(%rip)
  mov %r11, fo + 16(%rip)
  lea fo(%rip), %rsp
  sub $2, %ecx
  mov %rcx, (%rsp)
  movq ${LINUX_CODE32}, 8(%rsp)
  movq ${LINUX_DATA3}, 32(%rsp)
  jmp pv_shim_vectors + 8 * 6
