//! What a front end asks for, by the vhost-user protocol.
//!
//! This runs on a thread of the port's own, which may wait. It prepares all
//! that takes time; what it changes, the worker changes for it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error as Refused, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::device::Device;
use super::event::{self, Kick};
use super::features::{self, PROTOCOL};
use super::memory::{self, Description, Log, Memory, Region};
use super::ring::{Addresses, Ring, Setup};
use super::{Error, Link};

/// A ring, as far as it has been described.
#[derive(Default)]
struct Described {
    size: u16,
    addresses: Option<Addresses>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
    /// Whether the worker serves it.
    live: bool,
    /// Where it stopped.
    base: u16,
}

/// A front end, and what it has said so far.
pub(super) struct Control {
    link: Arc<Link>,
    pairs: u16,
    features: u64,
    memory: Memory,
    rings: Vec<Described>,
}

fn refuse(error: Error) -> Refused {
    Refused::ReqHandlerError(std::io::Error::other(error))
}

impl Control {
    pub(super) fn new(link: Arc<Link>, pairs: u16) -> Self {
        Self {
            link,
            pairs,
            features: 0,
            memory: Memory::default(),
            rings: (0..2 * pairs).map(|_| Described::default()).collect(),
        }
    }

    /// Has the worker change the device; what it answers.
    fn with<R: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Device) -> R + Send + 'static,
    ) -> Result<R> {
        self.link.with(change).map_err(refuse)
    }

    fn ring(&mut self, index: u32) -> Result<&mut Described> {
        self.rings
            .get_mut(index as usize)
            .ok_or(Refused::InvalidParam)
    }

    /// Starts a ring when it has been described.
    fn start(&mut self, index: u32) -> Result<()> {
        let (features, memory) = (self.features, self.memory.clone());
        // Buffers for frames to the guest are looked at when there are some.
        let poll = (index % 2 == 1).then(|| Arc::clone(&self.link.poll));
        let ring = self.ring(index)?;
        let (Some(addresses), true) = (ring.addresses, ring.size > 0) else {
            return Ok(());
        };
        let Some(kick) = ring.kick.take() else {
            return Ok(());
        };
        let kick = Kick::new(kick, poll.as_ref()).map_err(Refused::ReqHandlerError)?;
        let built = Ring::new(
            Setup {
                size: ring.size,
                addresses,
                features,
                kick,
                call: ring.call.take(),
                // Without features of the protocol there is no other way.
                enabled: ring.enabled || features & PROTOCOL == 0,
            },
            &memory,
        );
        let built = built.ok_or_else(|| refuse(Error::Outside))?;
        ring.live = true;
        // An old one, if there is one, is dropped here.
        self.with(move |device| device.install(index as usize, built))
            .map(drop)
    }

    fn stop(&mut self, index: u32) -> Result<u16> {
        let ring = self.ring(index)?;
        (ring.kick, ring.call) = (None, None);
        if !std::mem::take(&mut ring.live) {
            return Ok(ring.base);
        }
        let old = self.with(move |device| device.remove(index as usize))?;
        let ring = self.ring(index)?;
        if let Some(old) = old {
            ring.base = old.position();
        }
        Ok(ring.base)
    }

    fn stop_all(&mut self) -> Result<()> {
        for index in 0..self.rings.len() as u32 {
            self.stop(index)?;
        }
        Ok(())
    }

    /// The regions have changed.
    fn use_memory(&mut self, regions: Vec<Arc<Region>>) -> Result<()> {
        let memory = Memory::new(regions).map_err(refuse)?;
        self.memory = memory.clone();
        let (old, moved) = self.with(move |device| device.replace_memory(memory))?;
        drop(old);
        // A ring that is nowhere would go on in memory that is no more.
        moved.then_some(()).ok_or_else(|| refuse(Error::Outside))
    }
}

fn describe(region: &VhostUserMemoryRegion) -> Description {
    Description {
        guest: region.guest_phys_addr,
        user: region.user_addr,
        size: region.memory_size,
        offset: region.mmap_offset,
    }
}

impl VhostUserBackendReqHandlerMut for Control {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.stop_all()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all()?;
        for ring in &mut self.rings {
            *ring = Described::default();
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(features::offered(self.pairs))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !features::offered(self.pairs) != 0 {
            return Err(Refused::InvalidParam);
        }
        self.features = features;
        self.with(move |device| device.set_features(features))
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions = regions.iter().zip(&files);
        let regions =
            regions.map(|(region, file)| Ok(Arc::new(Region::new(describe(region), file)?)));
        let regions: std::result::Result<Vec<_>, Error> = regions.collect();
        self.use_memory(regions.map_err(refuse)?)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let ring = self.ring(index)?;
        let size = u16::try_from(size).map_err(|_| Refused::InvalidParam)?;
        if !size.is_power_of_two() || (ring.live && size != ring.size) {
            return Err(Refused::InvalidParam);
        }
        ring.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        let addresses = Addresses {
            descriptors,
            available,
            used,
            log: logged.then_some(log),
        };
        let ring = self.ring(index)?;
        ring.addresses = Some(addresses);
        if !ring.live {
            return self.start(index);
        }
        let memory = self.memory.clone();
        let moved = self.with(move |device| {
            let ring = device.ring(index as usize);
            ring.is_none_or(|ring| ring.move_to(Some(addresses), &memory))
        })?;
        moved.then_some(()).ok_or_else(|| refuse(Error::Outside))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        // Only an account: the used ring says where to go on.
        self.ring(index)?.base = base as u16;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.stop(index)?;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = u32::from(index);
        self.ring(index)?;
        // Without there is nothing to wake up from.
        let fd = fd.ok_or(Refused::InvalidParam)?;
        let fd = event::of(fd).map_err(Refused::ReqHandlerError)?;
        let call = if self.ring(index)?.live {
            let old = self.with(move |device| device.remove(index as usize))?;
            old.and_then(|mut old| old.call.take())
        } else {
            None
        };
        let ring = self.ring(index)?;
        ring.kick = Some(fd);
        ring.call = ring.call.take().or(call);
        self.start(index)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = u32::from(index);
        let fd = fd.map(event::of).transpose();
        let fd = fd.map_err(Refused::ReqHandlerError)?;
        let ring = self.ring(index)?;
        if !ring.live {
            ring.call = fd;
            return Ok(());
        }
        self.with(move |device| {
            device.ring(index as usize).map(|ring| {
                let old = std::mem::replace(&mut ring.call, fd);
                ring.tell();
                old
            })
        })
        .map(drop)
    }

    fn set_vring_err(&mut self, index: u8, _: Option<File>) -> Result<()> {
        self.ring(index.into()).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(features::protocol())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !features::protocol().bits() != 0 {
            return Err(Refused::InvalidParam);
        }
        Ok(())
    }

    /// In pairs, as all backends of network interfaces count.
    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.pairs.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let ring = self.ring(index)?;
        ring.enabled = enable;
        if !ring.live {
            return Ok(());
        }
        self.with(move |device| device.enable(index as usize, enable))
    }

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Err(Refused::InvalidParam)
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Err(Refused::InvalidParam)
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Refused::InvalidParam)
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Refused::InvalidParam)
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Refused::InvalidParam)
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Refused::InvalidParam)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(memory::MOST as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let region = Region::new(describe(region), &fd).map_err(refuse)?;
        let mut regions = self.memory.regions().to_vec();
        regions.push(Arc::new(region));
        self.use_memory(regions)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let gone = describe(region);
        let mut regions = self.memory.regions().to_vec();
        let before = regions.len();
        regions.retain(|region| {
            let is = region.is();
            (is.guest, is.user, is.size) != (gone.guest, gone.user, gone.size)
        });
        if regions.len() == before {
            return Err(Refused::InvalidParam);
        }
        self.use_memory(regions)
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Refused::InvalidParam)
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Refused::InvalidParam)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::default())
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = Log::new(&file, log.mmap_offset, log.mmap_size).map_err(refuse)?;
        let log = Some(Arc::new(log));
        self.with(move |device| std::mem::replace(&mut device.log, log))
            .map(drop)
    }
}
