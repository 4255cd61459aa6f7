//! The hypervisor's area of a guest: the shim's code and data, the tables that
//! the processor reads, and the page tables that show all that.

use std::mem::offset_of;

use blanket_memory::GuestRam;
use blanket_pv_shim::layout::{self, Context, Data, frame, selector, vcpu};
use blanket_pv_shim::{Label, code, user_entry};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryError};

use super::abi::PAGE_SIZE;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const UNCACHED: u64 = 1 << 4;
/// Accessed and dirty: the processor need not set them.
const USED: u64 = 0x60;
const LARGE: u64 = 1 << 7;
const LARGE_SIZE: u64 = 2 << 20;
const HUGE_SIZE: u64 = 1 << 30;
const ENTRIES: u64 = 512;

/// A table that points to others, for everybody.
const TABLE: u64 = PRESENT | WRITABLE | USER | USED;
/// What the kernel and the shim read and write.
const OPEN: u64 = TABLE;
/// What only ring 0 reads and writes.
const CLOSED: u64 = PRESENT | WRITABLE | USED;
/// What only ring 0 reads.
const SEALED: u64 = PRESENT | USED;

/// Bytes of the area for a guest with `memory` bytes: the table of frames is
/// its only part that grows.
#[must_use]
pub(crate) fn area_size(memory: u64) -> u64 {
    (layout::M2P + memory / PAGE_SIZE * 8).next_multiple_of(LARGE_SIZE)
}

/// Guest-physical address of a vCPU's part.
#[must_use]
pub(crate) fn part_gpa(vcpu: usize) -> u64 {
    layout::GPA + layout::VCPUS + vcpu as u64 * layout::VCPU_SIZE
}

/// Its virtual address.
#[must_use]
pub(crate) fn part_va(vcpu: usize) -> u64 {
    layout::VA + layout::VCPUS + vcpu as u64 * layout::VCPU_SIZE
}

/// Virtual address of a label in a vCPU's shim.
#[must_use]
pub(crate) fn label(vcpu: usize, label: Label) -> u64 {
    part_va(vcpu) + label.offset()
}

/// What the top page tables have in the hypervisor's slots.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slots {
    /// The area, as the kernel sees it.
    pub kernel: u64,
    /// All memory, as the shim sees it.
    pub direct: u64,
    /// The area, as user code's address spaces have it.
    pub user: u64,
}

/// Builds the area.
pub(crate) struct Area<'a> {
    ram: &'a GuestRam,
    memory: u64,
    vcpus: usize,
    /// The next free page for page tables.
    next: u64,
}

impl<'a> Area<'a> {
    /// For a guest with `memory` bytes and so many vCPUs.
    #[must_use]
    pub(crate) fn new(ram: &'a GuestRam, memory: u64, vcpus: usize) -> Self {
        Self {
            ram,
            memory,
            vcpus,
            next: layout::GPA + layout::PAGE_TABLES,
        }
    }

    /// Writes everything anew.
    ///
    /// # Errors
    /// The area is not in `ram`.
    pub(crate) fn build(mut self, trusted: bool) -> Result<Slots, GuestMemoryError> {
        self.clear(layout::GPA, layout::VCPUS)?;
        self.write_frames()?;
        let slots = Slots {
            kernel: self.kernel_view()? | TABLE,
            direct: self.direct_map()? | TABLE,
            user: self.user_view()? | TABLE,
        };
        for index in 0..self.vcpus {
            self.write_part(index, slots, trusted)?;
        }
        Ok(slots)
    }

    fn clear(&self, start: u64, len: u64) -> Result<(), GuestMemoryError> {
        const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
        for page in (start..start + len).step_by(PAGE_SIZE as usize) {
            self.ram.write_slice(&ZEROES, GuestAddress(page))?;
        }
        Ok(())
    }

    fn set(&self, table: u64, index: u64, entry: u64) -> Result<(), GuestMemoryError> {
        self.ram.write_obj(entry, GuestAddress(table + index * 8))
    }

    /// A new page table. (The area was cleared.)
    fn table(&mut self) -> u64 {
        let table = self.next;
        self.next += PAGE_SIZE;
        debug_assert!(self.next <= layout::GPA + layout::PAGE_TABLES + layout::PAGE_TABLES_SIZE);
        table
    }

    /// The machine's frame numbers are the domain's.
    fn write_frames(&self) -> Result<(), GuestMemoryError> {
        let frames: Vec<u64> = (0..self.memory / PAGE_SIZE).collect();
        let bytes: Vec<u8> = frames
            .iter()
            .flat_map(|frame| frame.to_le_bytes())
            .collect();
        self.ram
            .write_slice(&bytes, GuestAddress(layout::GPA + layout::M2P))
    }

    /// Page tables of the vCPUs' parts: `entry` says what shows a page.
    fn parts(
        &mut self,
        l2: u64,
        entry: impl Fn(usize, u64) -> u64,
    ) -> Result<(), GuestMemoryError> {
        let bytes = self.vcpus as u64 * layout::VCPU_SIZE;
        for start in (0..bytes).step_by(LARGE_SIZE as usize) {
            let l1 = self.table();
            self.set(l2, (layout::VCPUS + start) / LARGE_SIZE, l1 | TABLE)?;
            for page in 0..ENTRIES {
                let at = start + page * PAGE_SIZE;
                let index = (at / layout::VCPU_SIZE) as usize;
                if index < self.vcpus {
                    self.set(l1, page, entry(index, at % layout::VCPU_SIZE))?;
                }
            }
        }
        Ok(())
    }

    /// The area as the kernel and the shim see it.
    fn kernel_view(&mut self) -> Result<u64, GuestMemoryError> {
        let l3 = self.table();
        let size = area_size(self.memory);
        for start in (0..size).step_by(HUGE_SIZE as usize) {
            let l2 = self.table();
            self.set(l3, start / HUGE_SIZE, l2 | TABLE)?;
            for at in (start..size.min(start + HUGE_SIZE)).step_by(LARGE_SIZE as usize) {
                let entry = (layout::GPA + at) | OPEN | LARGE;
                self.set(l2, at % HUGE_SIZE / LARGE_SIZE, entry)?;
            }
            if start == 0 {
                self.parts(l2, |index, at| match at {
                    vcpu::APIC => layout::APIC_GPA | OPEN | UNCACHED,
                    _ => (part_gpa(index) + at) | OPEN,
                })?;
            }
        }
        Ok(l3)
    }

    /// The area as user code's address spaces have it.
    fn user_view(&mut self) -> Result<u64, GuestMemoryError> {
        let (l3, l2) = (self.table(), self.table());
        self.set(l3, 0, l2 | TABLE)?;
        self.parts(l2, |index, at| {
            let page = |offset| part_gpa(index) + offset;
            match at {
                vcpu::ENTRY => page(vcpu::USER_ENTRY) | PRESENT | USER | USED,
                vcpu::IDT => page(vcpu::USER_IDT) | SEALED,
                vcpu::STACK => page(vcpu::USER_STACK) | CLOSED,
                vcpu::TSS => page(vcpu::USER_TSS) | SEALED,
                vcpu::DATA => page(vcpu::DATA) | CLOSED,
                _ if at < vcpu::CODE_SIZE => page(at) | SEALED,
                _ if (vcpu::GDT..vcpu::GDT + vcpu::GDT_SIZE).contains(&at) => page(at) | CLOSED,
                _ => 0,
            }
        })?;
        Ok(l3)
    }

    /// All memory from address 0 on.
    fn direct_map(&mut self) -> Result<u64, GuestMemoryError> {
        let l3 = self.table();
        for start in (0..self.memory).step_by(HUGE_SIZE as usize) {
            let l2 = self.table();
            self.set(l3, start / HUGE_SIZE, l2 | TABLE)?;
            for at in (start..self.memory.min(start + HUGE_SIZE)).step_by(LARGE_SIZE as usize) {
                self.set(l2, at % HUGE_SIZE / LARGE_SIZE, at | OPEN | LARGE)?;
            }
        }
        Ok(l3)
    }

    /// A vCPU's part.
    fn write_part(
        &self,
        index: usize,
        slots: Slots,
        trusted: bool,
    ) -> Result<(), GuestMemoryError> {
        let part = Part::new(self.ram, index);
        self.clear(part.gpa, layout::VCPU_SIZE)?;
        let at = |offset| GuestAddress(part.gpa + offset);
        self.ram.write_slice(code(), at(vcpu::CODE))?;
        self.ram.write_slice(user_entry(), at(vcpu::USER_ENTRY))?;
        part.write_descriptors()?;
        part.write_tss()?;
        part.write_gates()?;
        part.write_landings()?;
        let info = layout::VA + layout::SHARED_INFO + index as u64 * 64;
        part.set8(offset_of!(Data, kernel_mode), 1)?;
        part.set8(offset_of!(Data, trusted), u8::from(trusted))?;
        part.set8(offset_of!(Data, asleep), 1)?;
        part.set32(offset_of!(Data, vcpus), self.vcpus as u32)?;
        part.set(offset_of!(Data, vcpu_info), info)?;
        part.set(offset_of!(Data, memory), self.memory)?;
        part.set(offset_of!(Data, kernel_slot), slots.kernel)?;
        part.set(offset_of!(Data, direct_slot), slots.direct)?;
        part.set(offset_of!(Data, user_slot), slots.user)
    }
}

/// A vCPU's part of the area. What it reads is the guest's to change.
pub(crate) struct Part<'a> {
    ram: &'a GuestRam,
    gpa: u64,
    va: u64,
}

impl<'a> Part<'a> {
    /// Of vCPU `index`.
    #[must_use]
    pub(crate) fn new(ram: &'a GuestRam, index: usize) -> Self {
        Self {
            ram,
            gpa: part_gpa(index),
            va: part_va(index),
        }
    }

    fn data(&self, field: usize) -> GuestAddress {
        GuestAddress(self.gpa + vcpu::DATA + field as u64)
    }

    /// Reads a field of [`Data`], named by its offset.
    ///
    /// # Errors
    /// The area is not in memory.
    pub(crate) fn get(&self, field: usize) -> Result<u64, GuestMemoryError> {
        self.ram.read_obj(self.data(field))
    }

    /// Reads a byte of it.
    ///
    /// # Errors
    /// As [`Part::get`].
    pub(crate) fn get8(&self, field: usize) -> Result<u8, GuestMemoryError> {
        self.ram.read_obj(self.data(field))
    }

    /// Writes a field of it.
    ///
    /// # Errors
    /// As [`Part::get`].
    pub(crate) fn set(&self, field: usize, value: u64) -> Result<(), GuestMemoryError> {
        self.ram.write_obj(value, self.data(field))
    }

    /// Writes four bytes of it.
    ///
    /// # Errors
    /// As [`Part::get`].
    pub(crate) fn set32(&self, field: usize, value: u32) -> Result<(), GuestMemoryError> {
        self.ram.write_obj(value, self.data(field))
    }

    /// Writes a byte of it.
    ///
    /// # Errors
    /// As [`Part::get`].
    pub(crate) fn set8(&self, field: usize, value: u8) -> Result<(), GuestMemoryError> {
        self.ram.write_obj(value, self.data(field))
    }

    /// The context that the shim keeps.
    ///
    /// # Errors
    /// As [`Part::get`].
    pub(crate) fn context(&self) -> Result<Context, GuestMemoryError> {
        let Shared(context) = self.ram.read_obj(self.data(offset_of!(Data, context)))?;
        Ok(context)
    }

    /// Gives the shim a context.
    ///
    /// # Errors
    /// As [`Part::get`].
    pub(crate) fn set_context(&self, context: Context) -> Result<(), GuestMemoryError> {
        self.ram
            .write_obj(Shared(context), self.data(offset_of!(Data, context)))
    }

    /// Writes words to the page of `stack` (the kernel's or the user's) at
    /// `offset`.
    ///
    /// # Errors
    /// As [`Part::get`].
    pub(crate) fn write_frame(
        &self,
        stack: u64,
        offset: u64,
        words: [u64; 5],
    ) -> Result<(), GuestMemoryError> {
        self.ram
            .write_obj(words, GuestAddress(self.gpa + stack + offset))
    }

    /// Reads the frame there.
    ///
    /// # Errors
    /// As [`Part::get`].
    pub(crate) fn read_frame(&self, stack: u64, offset: u64) -> Result<[u64; 5], GuestMemoryError> {
        self.ram.read_obj(GuestAddress(self.gpa + stack + offset))
    }

    /// A frame that goes on in the shim, in ring 3.
    #[must_use]
    pub(crate) fn landing(&self, label: Label) -> [u64; 5] {
        const INTERRUPTS: u64 = 0x202;
        [
            self.va + label.offset(),
            u64::from(selector::LINUX_CODE3),
            INTERRUPTS,
            self.va + vcpu::STACK + frame::TOP,
            u64::from(selector::LINUX_DATA3),
        ]
    }

    fn write_landings(&self) -> Result<(), GuestMemoryError> {
        for (offset, label) in [
            (frame::USER_FAULT, Label::LandingFault),
            (frame::USER_DOOR, Label::LandingDoor),
            (frame::USER_INTERRUPT, Label::LandingEvent),
            (frame::USER_INTERRUPT - frame::SECOND, Label::LandingEvent),
            (frame::TRUSTED_LANDING, Label::LandingTrusted),
            (frame::WAKE, Label::Woken),
            (frame::FAULT_LANDING, Label::LandingKernelFault),
        ] {
            self.write_frame(vcpu::STACK, offset, self.landing(label))?;
        }
        let mut entry = self.landing(Label::Entry);
        entry[0] = self.va + vcpu::ENTRY;
        let hardware = self.data(offset_of!(Data, hardware));
        self.ram.write_obj(entry, hardware)
    }

    /// Writes a descriptor into the table of this vCPU.
    ///
    /// # Errors
    /// As [`Part::get`].
    pub(crate) fn set_descriptor(&self, index: u64, value: u64) -> Result<(), GuestMemoryError> {
        let at = self.gpa + vcpu::GDT + index * 8 % vcpu::GDT_SIZE;
        self.ram.write_obj(value, GuestAddress(at))
    }

    /// The hypervisor's descriptors, and Linux's, which the shim runs with.
    fn write_descriptors(&self) -> Result<(), GuestMemoryError> {
        const CODE0: u64 = 0x00af_9b00_0000_ffff;
        const DATA0: u64 = 0x00cf_9300_0000_ffff;
        const CODE3: u64 = 0x00af_fb00_0000_ffff;
        const CODE32: u64 = 0x00cf_fb00_0000_ffff;
        const DATA3: u64 = 0x00cf_f300_0000_ffff;
        let tss = self.va + vcpu::TSS;
        for (selector, value) in [
            (selector::LINUX_DATA3, DATA3),
            (selector::LINUX_CODE3, CODE3),
            (selector::CODE0, CODE0),
            (selector::DATA0, DATA0),
            (selector::CODE32, CODE32),
            (selector::DATA3, DATA3),
            (selector::CODE3, CODE3),
            (
                selector::TSS,
                0x0000_8900_0000_0000
                    | TSS_LIMIT
                    | (tss & 0xff_ffff) << 16
                    | (tss >> 24 & 0xff) << 56,
            ),
            (selector::TSS + 8, tss >> 32),
        ] {
            self.set_descriptor(u64::from(selector) / 8, value)?;
        }
        Ok(())
    }

    fn write_tss(&self) -> Result<(), GuestMemoryError> {
        const RSP0: u64 = 4;
        const IST1: u64 = 0x24;
        const BITMAP_BASE: u64 = 0x66;
        let stack = self.va + vcpu::STACK;
        for tss in [vcpu::TSS, vcpu::USER_TSS] {
            let at = |offset| GuestAddress(self.gpa + tss + offset);
            self.ram
                .write_obj(stack + frame::USER_INTERRUPT + 40, at(RSP0))?;
            for (i, top) in (0..).zip(layout::INTERRUPT_STACKS) {
                self.ram.write_obj(stack + top, at(IST1 + 8 * i))?;
            }
            self.ram.write_obj(BITMAP as u16, at(BITMAP_BASE))?;
            for byte in BITMAP..=TSS_LIMIT {
                self.ram.write_obj(0xffu8, at(byte))?;
            }
        }
        // The shim rings doorbells: four bytes wide.
        let (byte, bit) = (
            u64::from(layout::DOORBELL_PORT) / 8,
            layout::DOORBELL_PORT % 8,
        );
        let at = GuestAddress(self.gpa + vcpu::TSS + BITMAP + byte);
        self.ram.write_obj(!(0xfu8 << bit), at)
    }

    /// Writes both tables of interrupt descriptors.
    fn write_gates(&self) -> Result<(), GuestMemoryError> {
        const BREAKPOINT: u8 = 3;
        const PAGE_FAULT: u8 = 14;
        for vector in 0..32u8 {
            for table in [vcpu::IDT, vcpu::USER_IDT] {
                let target = Label::Vectors.offset() + 8 * u64::from(vector);
                self.gate(table, vector, target, Gate::ring0(stacks::OTHER))?;
            }
        }
        for (table, vector, label, gate) in [
            (vcpu::IDT, BREAKPOINT, None, Gate::open(stacks::DOOR)),
            (
                vcpu::IDT,
                PAGE_FAULT,
                Some(Label::KernelFault),
                Gate::ring0(stacks::KERNEL_FAULT),
            ),
            (
                vcpu::IDT,
                layout::EVENT_VECTOR,
                Some(Label::Event),
                Gate::ring3(),
            ),
            (
                vcpu::IDT,
                layout::TIMER_VECTOR,
                Some(Label::Timer),
                Gate::ring3(),
            ),
            (
                vcpu::USER_IDT,
                BREAKPOINT,
                Some(Label::UserDoor),
                Gate::open(stacks::USER_DOOR),
            ),
            (
                vcpu::USER_IDT,
                PAGE_FAULT,
                Some(Label::UserFault),
                Gate::ring0(stacks::USER_FAULT),
            ),
            (
                vcpu::USER_IDT,
                layout::EVENT_VECTOR,
                Some(Label::UserEvent),
                Gate::ring0(stacks::RING0),
            ),
            (
                vcpu::USER_IDT,
                layout::TIMER_VECTOR,
                Some(Label::UserTimer),
                Gate::ring0(stacks::RING0),
            ),
        ] {
            let stub = Label::Vectors.offset() + 8 * u64::from(vector);
            let target = label.map_or(stub, Label::offset);
            self.gate(table, vector, target, gate)?;
        }
        Ok(())
    }

    fn gate(
        &self,
        table: u64,
        vector: u8,
        target: u64,
        gate: Gate,
    ) -> Result<(), GuestMemoryError> {
        let target = self.va + target;
        let low = target & 0xffff
            | u64::from(gate.selector) << 16
            | u64::from(gate.stack) << 32
            | u64::from(gate.kind) << 40
            | (target >> 16 & 0xffff) << 48;
        let at = self.gpa + table + 16 * u64::from(vector);
        self.ram.write_obj([low, target >> 32], GuestAddress(at))
    }
}

/// Offset of the I/O permission bitmap in the task state segment.
const BITMAP: u64 = 0x68;
/// The last byte of the segment: the bitmap reaches to the doorbell, and ends
/// with a byte of ones.
pub(crate) const TSS_LIMIT: u64 = BITMAP + layout::DOORBELL_PORT as u64 / 8 + 2;

/// Indices of interrupt stacks.
mod stacks {
    pub(super) const RING0: u8 = 0;
    pub(super) const KERNEL_FAULT: u8 = 1;
    pub(super) const DOOR: u8 = 2;
    pub(super) const OTHER: u8 = 4;
    pub(super) const USER_FAULT: u8 = 5;
    pub(super) const USER_DOOR: u8 = 6;
}

#[derive(Clone, Copy)]
struct Gate {
    selector: u16,
    stack: u8,
    /// Present, privilege and type.
    kind: u8,
}

impl Gate {
    /// To ring 0, interrupts off.
    fn ring0(stack: u8) -> Self {
        Self {
            selector: selector::CODE0,
            stack,
            kind: 0x8e,
        }
    }

    /// The same, for an instruction of ring 3.
    fn open(stack: u8) -> Self {
        Self {
            kind: 0xee,
            ..Self::ring0(stack)
        }
    }

    /// To ring 3, interrupts as they are, on the stack in use.
    fn ring3() -> Self {
        Self {
            selector: selector::LINUX_CODE3,
            stack: stacks::RING0,
            kind: 0xef,
        }
    }
}

/// A context as bytes.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Shared(Context);

// SAFETY: integers in C layout, padding spelled out; all bit patterns are
// valid.
unsafe impl ByteValued for Shared {}
