# Ring 3: macros, the delivery to the guest's kernel, the way in and out of
# hypercalls, and the small ones.

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

# For a context of user code: 32-bit code's `syscall` arrives in ring 0 where KVM
# interprets that, at address 0. It gets no further: it has jumped there.
.macro USER_SEGMENTS
  testb $3, c_cs(%rip)
  jnz 79f
  movq ${LINUX_CODE32}, c_cs(%rip)
  movq ${LINUX_DATA3}, c_ss(%rip)
79:
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

# ---- `syscall` of the kernel (and of user code, where both share a view).
.globl pv_shim_entry
pv_shim_entry:
  cmpb $0, kernel_mode(%rip)
  je trusted_syscall
entry_of_kernel:
  COUNT 0
  COUNT 10
  mov %rcx, ret(%rip)
hypercall:
  cmp $(table_end - table) / 4, %rax
  jae slow
  lea table(%rip), %r11
  movslq (%r11, %rax, 4), %rcx
  add %r11, %rcx
  jmp *%rcx
# ---- The same from the kernel's own functions, without `syscall`.
.globl pv_shim_jumped
pv_shim_jumped:
  COUNT 0
  mov jumps_return(%rip), %rcx
  mov %rcx, ret(%rip)
  jmp hypercall
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
# Linux calls it at each switch of tasks. User code may have set the bases of FS
# and GS itself, which the kernel does not know of: with null selectors they are
# what the kernel has set, or zero, and no next task's.
h_stack_switch:
  mov %rsi, kernel_sp(%rip)
  mov %fs, %eax
  test $~3, %eax
  jnz 1f
  rdfsbase %rax
  test %rax, %rax
  jz 1f
  cmp %rax, set_fs(%rip)
  je 1f
  xor %eax, %eax
  wrfsbase %rax
1: mov %gs, %eax
  test $~3, %eax
  jnz ok
  mov user_gs(%rip), %rax
  cmp %rax, set_gs(%rip)
  je ok
  movq $0, user_gs(%rip)
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
  mov %rsi, set_fs(%rip)
  jmp ok
2: mov %rsi, user_gs(%rip)
  mov %rsi, set_gs(%rip)
  jmp ok
3: wrgsbase %rsi
  mov %rsi, kernel_gs(%rip)
  jmp ok
