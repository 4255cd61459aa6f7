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
.set f_gate, f_rax + 24
.set i_rax, data + {interrupt}
.set i_rcx, i_rax + 8
.set i_r11, i_rax + 16
.set i_door, i_rax + 24
.set halt_rsp, data + {halt_rsp}
.set counters, data + {counters}
.set hw_frame, data + {hardware}

.set kf, stack + {KERNEL_FAULT}      # error, rip, cs, rflags, rsp, ss
.set uf, user_stack + {USER_FAULT}
.set ud, user_stack + {USER_DOOR}
.set ui, user_stack + {USER_INTERRUPT}
.set ti, stack + {USER_INTERRUPT}      # where user code shares the view
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
d_forget:                            # page at RDI
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

# ======== Ring 3 from here on.

# ---- Macros of ring 3.
# Goes through a door whose code ends in sysretq. Changes RCX and R11.
.macro QUICK name
  lea 77f(%rip), %rcx
  mov $0x202, %r11d
  movw $(\name - pv_shim_start), idt + 48(%rip)
  int3
77: mov stack + {DOOR} + 24(%rip), %rsp # sysretq leaves it to us
  movw $(pv_shim_vectors + 24 - pv_shim_start), idt + 48(%rip)
.endm
# Loads the kernel's page table anew. Changes RAX, RCX, R11.
.macro FLUSH
  incq epoch(%rip)
  mov kernel_cr3(%rip), %rax
  QUICK d_cr3
.endm
# Gives the top page table of frame RCX the area and the direct map.
.macro SLOTS
  mov %rcx, %rax
  shl $12, %rax
  cmp memory(%rip), %rax
  jae mmuext_bad
  movabs ${DIRECT_MAP} + 8 * 257, %r11
  add %rax, %r11
  mov kernel_slot(%rip), %rax
  cmp %rax, (%r11)
  je 78f
  mov %rax, (%r11)
78: mov direct_slot(%rip), %rax
  cmp %rax, 8(%r11)
  je 79f
  mov %rax, 8(%r11)
79:
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
# Sets the timer's event channel pending. Changes RAX, RCX.
.macro RAISE_TIMER
  mov timer_port(%rip), %rax
  test %rax, %rax
  jz 79f
  movabs ${SHARED_INFO} + 2048, %rcx
  lock bts %rax, (%rcx)
  bt %rax, 512(%rcx)
  jc 79f
  shr $6, %eax
  mov vcpu_info(%rip), %rcx
  lock bts %rax, 8(%rcx)
  movb $1, (%rcx)
79:
.endm
# Copies the frame at RCX into the context. Changes RAX.
.macro FRAME
  mov (%rcx), %rax
  mov %rax, c_rip(%rip)
  mov 8(%rcx), %rax
  mov %rax, c_cs(%rip)
  mov 16(%rcx), %rax
  mov %rax, c_rflags(%rip)
  mov 24(%rcx), %rax
  mov %rax, c_rsp(%rip)
  mov 32(%rcx), %rax
  mov %rax, c_ss(%rip)
.endm

# ---- Delivers what `context` says to the guest's kernel: pushes a frame and
# jumps to the handler. Only RAX, RCX, R11 are not the guest's here.
.globl pv_shim_deliver
pv_shim_deliver:
deliver:
  mov vcpu_info(%rip), %r11
  cmpb $0, kernel_mode(%rip)
  jne 1f
  KERNEL_GATES
  rdgsbase %rax
  mov %rax, user_gs(%rip)
  mov kernel_gs(%rip), %rax
  wrgsbase %rax
  movb $1, kernel_mode(%rip)
  mov kernel_sp(%rip), %rsp
  jmp 2f
1: mov c_rsp(%rip), %rsp
  and $~15, %rsp
2: movzbl 1(%r11), %eax
  push c_ss(%rip)
  push c_rsp(%rip)
  mov c_rflags(%rip), %rcx
  and $~0x3200, %ecx
  test %eax, %eax
  jne 3f
  or $0x200, %ecx
3: push %rcx
  shl $32, %rax
  or c_cs(%rip), %rax
  push %rax
  push c_rip(%rip)
  cmpb $0, c_has_error(%rip)
  je 4f
  push c_error(%rip)
4: push c_r11(%rip)
  push c_rcx(%rip)
  mov c_mask(%rip), %al
  or %al, 1(%r11)
  # Single steps and nested tasks end here; the direction is forwards.
  pushq $0x202
  popfq
  mov c_rax(%rip), %rax
  jmp *c_handler(%rip)
deliver_end:

# ---- `syscall` of the kernel (and of user code, where both share a view).
.globl pv_shim_entry
pv_shim_entry:
  cmpb $0, kernel_mode(%rip)
  je trusted_syscall
  COUNT 0
  mov %rcx, ret(%rip)
hypercall:
  cmp $(table_end - table) / 4, %rax
  jae slow
  lea table(%rip), %r11
  movslq (%r11, %rax, 4), %rcx
  add %r11, %rcx
  jmp *%rcx
.balign 4
table:
.macro ENTRY name
  .long \name - table
.endm
  ENTRY slow                         # 0 set_trap_table
  ENTRY h_mmu_update
  ENTRY slow
  ENTRY h_stack_switch
  ENTRY slow
  ENTRY ok                           # 5 fpu_taskswitch
  ENTRY slow
  ENTRY slow
  ENTRY slow
  ENTRY slow
  ENTRY slow                         # 10
  ENTRY slow
  ENTRY slow
  ENTRY h_multicall
  ENTRY h_update_va_mapping
  ENTRY slow                         # 15
  ENTRY slow
  ENTRY h_xen_version
  ENTRY slow
  ENTRY slow
  ENTRY slow                         # 20
  ENTRY slow
  ENTRY slow
  ENTRY h_iret
  ENTRY h_vcpu_op
  ENTRY h_set_segment_base           # 25
  ENTRY h_mmuext_op
  ENTRY slow
  ENTRY slow
  ENTRY h_sched_op
  ENTRY slow                         # 30
  ENTRY slow
  ENTRY h_event_channel_op
table_end:

slow:
  CALL 0
  jmp done
bad_address:
  mov $-14, %rax
  jmp done
invalid:
  mov $-22, %rax
  jmp done
.globl pv_shim_invalid
.set pv_shim_invalid, invalid
h_stack_switch:
  mov %rsi, kernel_sp(%rip)
ok:
  xor %eax, %eax
.globl pv_shim_done
pv_shim_done:
done:
  cmpb $0, in_multicall(%rip)
  jne multicall_next
leave:                               # RAX: result
  mov ret(%rip), %rcx
  mov vcpu_info(%rip), %r11
leave_check:
  cmpw $1, (%r11)
  je leave_upcall
  jmp *%rcx
leave_end:
leave_upcall:
  mov %rax, c_rax(%rip)
  mov %rcx, c_rcx(%rip)
  mov %rcx, c_rip(%rip)
  movq $0x202, c_r11(%rip)
  movq $0x202, c_rflags(%rip)
  mov %rsp, c_rsp(%rip)
  movq ${KERNEL_CS}, c_cs(%rip)
  movq ${KERNEL_SS}, c_ss(%rip)
.globl pv_shim_upcall
pv_shim_upcall:
upcall:                              # `context` but for handler and flags
  mov event_handler(%rip), %rax
  mov %rax, c_handler(%rip)
  movw $0x100, c_has_error(%rip)     # no error code, masked
  jmp deliver

# ---- multicall: RDI entries of 64 bytes, RSI of them
h_multicall:
  test %rsi, %rsi
  jz ok
  cmp $0x100000, %rsi
  ja invalid
  cmpb $0, in_multicall(%rip)
  jne invalid
  mov %rdi, multicall(%rip)
  mov %rsi, multicall + 8(%rip)
  movb $1, in_multicall(%rip)
multicall_go:
  mov multicall(%rip), %r11
  mov (%r11), %rax
  mov 16(%r11), %rdi
  mov 24(%r11), %rsi
  mov 32(%r11), %rdx
  mov 40(%r11), %r10
  mov 48(%r11), %r8
  cmp $23, %rax                      # iret has no place in a multicall
  jne hypercall
  mov $-38, %rax
multicall_next:
  mov multicall(%rip), %r11
  mov %rax, 8(%r11)
  add $64, %r11
  mov %r11, multicall(%rip)
  decq multicall + 8(%rip)
  jnz multicall_go
  movb $0, in_multicall(%rip)
  xor %eax, %eax
  jmp leave

h_xen_version:
  test %edi, %edi
  jnz slow
  mov ${XEN_VERSION}, %eax
  jmp done

h_vcpu_op:                           # is_up of what is no vCPU: Linux asks often
  cmp $3, %edi
  jne slow
  cmp vcpus(%rip), %esi
  jb slow
  mov $-2, %rax
  jmp done

h_set_segment_base:
  cmp $1, %edi
  jb 1f
  je 2f
  cmp $3, %edi
  jb 3f
  ja slow
  # A selector for user code. At each switch of tasks it is the null one, or
  # flat data and then the null one, to clear the base.
  test $~3, %esi
  jz 4f
  cmp ${LINUX_DATA3}, %esi
  jne slow
4: mov %esi, %gs
  mov kernel_gs(%rip), %rcx
  wrgsbase %rcx
  movq $0, user_gs(%rip)
  jmp ok
1: wrfsbase %rsi
  jmp ok
2: mov %rsi, user_gs(%rip)
  jmp ok
3: wrgsbase %rsi
  mov %rsi, kernel_gs(%rip)
  jmp ok

# ---- mmu_update: RDI requests of 16 bytes, ESI of them, RDX where to say how
# many were done. Frames are machine frames: what the kernel may do to its own
# memory is its own business, so only the bound is checked.
h_mmu_update:
  COUNT 1
  test %esi, %esi
  jle slow
  mov %esi, %esi
  mov %rsi, scratch(%rip)
  movabs ${DIRECT_MAP}, %r11
1: mov (%rdi), %rax
  mov 8(%rdi), %r10
  mov %eax, %ecx
  and $~7, %rax
  and $3, %ecx
  cmp $1, %ecx
  je 4f                              # machine to frame: the identity
  cmp memory(%rip), %rax
  jae 5f
  test $1, %r10b
  jz 2f
  or $4, %r10                        # the kernel runs in ring 3
2: cmp $2, %ecx
  jne 3f
  mov (%r11, %rax), %rcx
  and $0x60, %ecx
  or %rcx, %r10
3: cmpl $1, scratch(%rip)
  je 7f
  mov %r10, (%r11, %rax)
4: add $16, %rdi
  dec %rsi
  jnz 1b
  xor %eax, %eax
  jmp 6f
5: mov $-22, %rax
6: test %rdx, %rdx
  jz done
  mov scratch(%rip), %rcx
  sub %rsi, %rcx
  mov %ecx, (%rdx)
  jmp done
7: lea (%r11, %rax), %rcx             # a single one
  lea 8f(%rip), %r8
  jmp store
8: xor %eax, %eax
  xor %esi, %esi
  jmp 6b

# ---- Stores R10 at RCX, in the direct map, then goes on at R8. Changes RAX,
# RCX, RSI, RDI, R11.
# Where KVM shadows page tables, the first store to one after a page table was
# loaded faults, and at the next such load KVM compares each entry that is in
# use with its shadow. A store by ring 0 costs the same for any table, and
# spares that. Which tables are shadowed only KVM knows: those to which a store
# was slow. In a batch of stores to one table the comparison is the cheaper.
.set SLOW, 2000                      # ticks: a store without a fault has some 10
store:
  cmp %r10, (%rcx)
  je 9f
  mov %rdx, scratch + 16(%rip)
  mov %rcx, %rdi
  shr $12, %rcx
  mov %ecx, %eax
  and $63, %eax
  shl $5, %eax
  lea slow_tables(%rip), %r11
  add %rax, %r11                     # table; epochs of both ways; doors left
  cmp %rcx, (%r11)
  jne 4f
  mov epoch(%rip), %rax
  cmp %rax, 8(%r11)
  je 6f                              # it will be compared anyway
  cmp %rax, 16(%r11)
  je 3f
  mov %rax, 16(%r11)
  shl $12, %rcx
  xor %edx, %edx
  mov $512, %eax
2: mov (%rcx), %esi
  and $1, %esi
  add %esi, %edx
  add $8, %rcx
  dec %eax
  jnz 2b
  add $48, %edx
  shr $6, %edx
  mov %rdx, 24(%r11)
3: decq 24(%r11)
  js 4f
  mov %r10, %rsi
  QUICK d_store
  jmp 7f
4: rdtsc
  shl $32, %rdx
  or %rdx, %rax
  mov %rax, %rsi
  mov %r10, (%rdi)
  rdtsc
  shl $32, %rdx
  or %rdx, %rax
  sub %rsi, %rax
  cmp $SLOW, %rax
  jb 7f
  mov %rdi, %rcx
  shr $12, %rcx
  mov %rcx, (%r11)
  mov epoch(%rip), %rax
  mov %rax, 8(%r11)
  jmp 7f
6: mov %r10, (%rdi)
7: mov scratch + 16(%rip), %rdx
9: jmp *%r8

# ---- update_va_mapping: RDI address, RSI entry, RDX flags
.macro WALK shift                    # RAX: table, then the next one
  cmp memory(%rip), %rax
  jae invalid
  add %r11, %rax
  mov %rdi, %rcx
  shr $\shift, %rcx
  and $511, %ecx
  mov (%rax, %rcx, 8), %rax
  test $1, %al
  jz invalid
  .if \shift < 39
  test $0x80, %al
  jnz invalid
  .endif
  and %r8, %rax
.endm
h_update_va_mapping:
  COUNT 2
  mov %rdi, scratch(%rip)
  movabs ${DIRECT_MAP}, %r11
  movabs $0x000ffffffffff000, %r8
  mov kernel_cr3(%rip), %rax
  WALK 39
  WALK 30
  WALK 21
  cmp memory(%rip), %rax
  jae invalid
  add %r11, %rax
  mov %rdi, %rcx
  shr $12, %rcx
  and $511, %ecx
  lea (%rax, %rcx, 8), %rax
  test $1, %sil
  jz 1f
  or $4, %rsi
  # A page table becomes read-only in the kernel's eyes when it is put to use.
  # It stays writable: updates of it need no help then.
  test %rdi, %rdi
  jns 1f
  mov (%rax), %rcx
  test $1, %cl
  jz 1f
  mov %rcx, %r10
  xor %rsi, %r10
  and %r8, %r10
  jnz 1f
  test $2, %sil
  jz 6f
  # Writable: it is no page table any more. KVM that shadows it does not know,
  # and would treat each store to it as one to a page table. A store of less
  # than an entry, by ring 0, tells it.
  mov %rsi, %rdi
  and %r8, %rdi
  cmp memory(%rip), %rdi
  jae 1f
  add %r11, %rdi
  mov %rax, %r10
  QUICK d_forget
  mov %r10, %rax
  jmp 1f
6: and $2, %ecx
  or %rcx, %rsi
1: mov %rsi, %r10
  mov %rax, %rcx
  lea 5f(%rip), %r8
  jmp store
5: mov %r10, %rsi
  mov %edx, %ecx
  and $3, %ecx
  jz ok
  cmp $3, %rdx
  ja 3f
2: cmp $2, %ecx
  je 4f
  FLUSH
  jmp ok
3: # to several vCPUs: the monitor sees to the others
  cmpl $1, vcpus(%rip)
  je 2b
  mov scratch(%rip), %rdi
  mov $14, %eax
  jmp slow
4: mov scratch(%rip), %rax
  QUICK d_invlpg
  jmp ok

# ---- mmuext_op: RDI operations of 24 bytes, ESI of them, RDX done
h_mmuext_op:
  COUNT 3
  test %esi, %esi
  jle slow
  mov %esi, %esi
  mov %rsi, scratch(%rip)
  movq $0, scratch + 8(%rip)         # a page table is to be loaded
mmuext_one:
  mov (%rdi), %eax
  mov 8(%rdi), %rcx
  cmp $(mmuext_table_end - mmuext_table) / 4, %eax
  jae mmuext_slow
  lea mmuext_table(%rip), %r11
  movslq (%r11, %rax, 4), %rax
  add %r11, %rax
  jmp *%rax
.macro OPERATION name
  .long \name - mmuext_table
.endm
.balign 4
mmuext_table:
  OPERATION mx_pin                   # 0 pin L1
  OPERATION mx_pin
  OPERATION mx_pin
  OPERATION mx_pin
  OPERATION mmuext_next              # 4 unpin
  OPERATION mx_base                  # 5 new base pointer
  OPERATION mx_flush                 # 6 local flush
  OPERATION mx_invlpg                # 7
  OPERATION mx_flush_many            # 8
  OPERATION mx_invlpg_many           # 9
  OPERATION mx_flush_all             # 10
  OPERATION mx_invlpg_all            # 11
  OPERATION mmuext_next              # 12 flush caches
  OPERATION mmuext_slow              # 13 set LDT
  OPERATION mmuext_slow
  OPERATION mx_user_base             # 15
  OPERATION mx_clear                 # 16
  OPERATION mx_copy                  # 17
mmuext_table_end:
mx_pin:
  shl $12, %rcx
  cmp memory(%rip), %rcx
  jae mmuext_bad
  movabs ${DIRECT_MAP}, %r11
  add %rcx, %r11
  mov $512, %ecx
1: mov (%r11), %rax
  and $5, %eax
  cmp $1, %eax
  jne 2f
  orq $4, (%r11)
2: add $8, %r11
  dec %ecx
  jnz 1b
  jmp mmuext_next
mx_base:
  SLOTS
  shl $12, %rcx
  mov %rcx, kernel_cr3(%rip)
  mov %rcx, imm_door(%rip)
  mov %rcx, imm_event(%rip)
  mov %rcx, imm_fault(%rip)
mx_flush:
  movq $1, scratch + 8(%rip)
  jmp mmuext_next
mx_flush_all:
mx_flush_many:
  cmpl $1, vcpus(%rip)
  je mx_flush
  jmp mmuext_slow
mx_invlpg_all:
mx_invlpg_many:
  cmpl $1, vcpus(%rip)
  jne mmuext_slow
mx_invlpg:
  mov %rcx, %rax
  QUICK d_invlpg
  jmp mmuext_next
mx_user_base:
  test %rcx, %rcx
  jz 1f
  shl $12, %rcx
  cmp memory(%rip), %rcx
  jae mmuext_bad
  cmpb $0, trusted(%rip)
  jne 1f
  movabs ${DIRECT_MAP} + 8 * 257, %r11
  add %rcx, %r11
  mov user_slot(%rip), %rax
  cmp %rax, (%r11)
  je 2f
  mov %rax, (%r11)
2: cmpq $0, 8(%r11)
  je 1f
  movq $0, 8(%r11)
1: mov %rcx, user_cr3(%rip)
  jmp mmuext_next
mx_clear:
  shl $12, %rcx
  cmp memory(%rip), %rcx
  jae mmuext_bad
  mov %rdi, scratch + 16(%rip)
  movabs ${DIRECT_MAP}, %rdi
  add %rcx, %rdi
  xor %eax, %eax
  mov $512, %ecx
  rep stosq
  mov scratch + 16(%rip), %rdi
  jmp mmuext_next
mx_copy:
  mov 16(%rdi), %rax
  shl $12, %rcx
  shl $12, %rax
  cmp memory(%rip), %rcx
  jae mmuext_bad
  cmp memory(%rip), %rax
  jae mmuext_bad
  mov %rdi, scratch + 16(%rip)
  mov %rsi, scratch + 24(%rip)
  movabs ${DIRECT_MAP}, %rdi
  lea (%rdi, %rax), %rsi
  add %rcx, %rdi
  mov $512, %ecx
  rep movsq
  mov scratch + 16(%rip), %rdi
  mov scratch + 24(%rip), %rsi
  jmp mmuext_next
mmuext_slow:                         # one operation by the monitor
  mov %rdi, scratch + 16(%rip)
  mov %rsi, scratch + 24(%rip)
  mov $26, %eax
  CALL 0
  mov scratch + 16(%rip), %rdi
  mov scratch + 24(%rip), %rsi
  test %rax, %rax
  jnz mmuext_end
mmuext_next:
  add $24, %rdi
  dec %rsi
  jnz mmuext_one
  xor %eax, %eax
  jmp mmuext_end
mmuext_bad:
  mov $-22, %rax
mmuext_end:                          # RAX: result, RSI: left
  test %rdx, %rdx
  jz 1f
  mov scratch(%rip), %rcx
  sub %rsi, %rcx
  mov %ecx, (%rdx)
1: cmpq $0, scratch + 8(%rip)
  je done
  mov %rax, scratch(%rip)
  FLUSH
  mov scratch(%rip), %rax
  jmp done

h_sched_op:
  cmp $1, %edi
  ja slow
  jb ok                              # yield: there is nobody else
block:
  mov vcpu_info(%rip), %r11
  movb $0, 1(%r11)
  cmpb $0, (%r11)
  jne ok
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
  je ok
  movb $0, flush(%rip)
  FLUSH
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
  out %eax, %dx
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
iret_user_end:
iret_trusted:
  mov user_gs(%rip), %rax
  wrgsbase %rax
  movb $0, kernel_mode(%rip)
  GATES pv_shim_trusted_event, pv_shim_trusted_timer
  mov (%rsp), %rax
  mov 8(%rsp), %r11
  mov 16(%rsp), %rcx
  lea 32(%rsp), %rsp
iret_trusted_go:
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

# ---- System call of user code. RCX: RIP, R11: RFLAGS.
trusted_syscall:
  KERNEL_GATES
  mov %rsp, scratch(%rip)
  mov kernel_sp(%rip), %rsp
  push ${LINUX_DATA3}
  push scratch(%rip)
  push %r11
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
  mov fault_handler(%rip), %rax
  mov %rax, c_handler(%rip)
  movw $0x101, c_has_error(%rip)
  jmp deliver

# ---- Interrupts of user code.
.globl pv_shim_landing_trusted
pv_shim_landing_trusted:
  KERNEL_GATES
  mov %rax, c_rax(%rip)
  mov %rcx, c_rcx(%rip)
  lea ti(%rip), %rcx
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
  GATES pv_shim_trusted_event, pv_shim_trusted_timer
  mov c_rax(%rip), %rax
  mov c_rcx(%rip), %rcx
  mov c_r11(%rip), %r11
  lea c_rip(%rip), %rsp
user_again_go:
  iretq
user_again_end:

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
kernel_fault:
  mov kf + 8(%rip), %rax
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

# ---- Interrupts of the kernel and of the shim, on the stack of either: there
# may be one on top of the other, as KVM delivers one twice if its way into the
# guest is cut short.
.globl pv_shim_timer
pv_shim_timer:
  mov %rax, i_rax(%rip)
  mov %rcx, i_rcx(%rip)
  mov %r11, i_r11(%rip)
  lea pv_shim_start(%rip), %rcx
  mov (%rsp), %rax
  sub %rcx, %rax
  cmp $(pv_shim_timer - pv_shim_start), %rax
  je interrupt_twice
  RAISE_TIMER
  jmp 1f
.globl pv_shim_event
pv_shim_event:
  mov %rax, i_rax(%rip)
  mov %rcx, i_rcx(%rip)
  mov %r11, i_r11(%rip)
1: COUNT 9
  lea pv_shim_start(%rip), %rcx
  mov (%rsp), %rax
  sub %rcx, %rax
  cmp $(pv_shim_event - pv_shim_start), %rax
  je interrupt_twice
  cmp $(pv_shim_timer - pv_shim_start), %rax
  je interrupt_twice
  cmpb $0, flush(%rip)
  je 2f
  movzwl idt + 48(%rip), %eax        # a door may be open
  mov %rax, f_gate(%rip)
  mov stack + {DOOR}(%rip), %rax     # and its frame in use
  mov %rax, i_door(%rip)
  mov stack + {DOOR} + 24(%rip), %rax
  mov %rax, i_door + 8(%rip)
  movb $0, flush(%rip)
  FLUSH
  mov i_door(%rip), %rax
  mov %rax, stack + {DOOR}(%rip)
  mov i_door + 8(%rip), %rax
  mov %rax, stack + {DOOR} + 24(%rip)
  mov f_gate(%rip), %rax
  movw %ax, idt + 48(%rip)
2: mov (%rsp), %rax
  lea pv_shim_start(%rip), %rcx
  sub %rcx, %rax
  cmp ${CODE_SIZE} + 0x1000, %rax
  jb interrupt_shim
  mov vcpu_info(%rip), %rax
  cmpw $1, (%rax)
  jne interrupt_tail
  mov i_rax(%rip), %rax
  mov %rax, c_rax(%rip)
  mov i_rcx(%rip), %rax
  mov %rax, c_rcx(%rip)
  mov i_r11(%rip), %rax
  mov %rax, c_r11(%rip)
  mov %rsp, %rcx
  FRAME
  movq ${KERNEL_CS}, c_cs(%rip)
  movq ${KERNEL_SS}, c_ss(%rip)
  movl $0, apic_eoi(%rip)
  jmp upcall
# In the shim: it looks at the events itself, before it leaves; one that has
# looked already looks again.
interrupt_shim:
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
  cmp $(iret_kernel_go - pv_shim_start), %rax
  jne 5f
2: subq $32, 24(%rsp)
  jmp 5f
3: lea iret_user(%rip), %rcx
  cmp $(iret_trusted_end - pv_shim_start), %rax
  jae 4f
  cmp $(iret_user_check - pv_shim_start), %rax
  jb interrupt_tail
  movb $1, kernel_mode(%rip)
  cmp $(iret_trusted_go - pv_shim_start), %rax
  je 2b
  jmp 5f
4: lea user_again(%rip), %rcx
  cmp $(user_again_end - pv_shim_start), %rax
  jae interrupt_tail
  cmp $(user_again - pv_shim_start), %rax
  jb interrupt_tail
5: mov %rcx, (%rsp)
interrupt_tail:
  mov i_rax(%rip), %rax
  mov i_rcx(%rip), %rcx
  mov i_r11(%rip), %r11
  movl $0, apic_eoi(%rip)
  iretq
interrupt_twice:
  mov i_rax(%rip), %rax
  mov i_rcx(%rip), %rcx
  mov i_r11(%rip), %r11
  iretq
interrupt_end:
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
