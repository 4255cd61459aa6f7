# The hypercalls of the page tables.

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
  # Another processor may set the accessed and dirty bits at any time.
  lea (%r11, %rax), %rcx
  mov (%rcx), %rax
9: mov %eax, %r8d
  and $0x60, %r8d
  or %r10, %r8
  cmp %rax, %r8
  je 4f
  lock cmpxchg %r8, (%rcx)
  jne 9b
  jmp 4f
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
  # than an entry, by ring 0, tells it: for some pages at a time.
  mov %rsi, %rdi
  and %r8, %rdi
  cmp memory(%rip), %rdi
  jae 1f
  add %r11, %rdi
  mov forgotten(%rip), %rcx
  lea forget(%rip), %r11
  mov %rdi, (%r11, %rcx, 8)
  inc %ecx
  and $7, %ecx
  mov %rcx, forgotten(%rip)
  jnz 1f
  push %rax
  push %rdx
  push %rsi
  push %r9
  mov 8(%r11), %rax
  mov 16(%r11), %rdx
  mov 24(%r11), %rsi
  mov 32(%r11), %r8
  mov 40(%r11), %r9
  mov 48(%r11), %r10
  mov 56(%r11), %rdi
  push %rbx
  mov (%r11), %rbx
  QUICK d_forget
  pop %rbx
  pop %r9
  pop %rsi
  pop %rdx
  pop %rax
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
