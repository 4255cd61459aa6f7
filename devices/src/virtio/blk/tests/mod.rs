//! A disk driven through real rings in guest memory.

mod hostile;
mod serving;
mod upkeep;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use blanket_drivers::store::{Engine, Format, Image, Spec};
use blanket_memory::GuestRam;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{Bytes, GuestAddress};

use super::request::Status;
use super::*;
use crate::virtio::testing::{self, Driver};

/// Where the tests put a request's parts; below are the rings.
const HEADER_AT: u64 = 0x10_0000;
const STATUS_AT: u64 = 0x10_8000;
const DATA_AT: u64 = 0x20_0000;
const RAM: usize = 0x40_0000;

const EVERYTHING: u64 = 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_CONFIG_WCE
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// No status: the device has to write one.
const NO_STATUS: u8 = 0xee;

fn image_of(dir: &Path, len: usize) -> (PathBuf, Spec) {
    let path = dir.join("some-disk.raw");
    std::fs::write(&path, vec![0x11; len]).unwrap();
    let spec = Spec {
        path: path.clone(),
        readonly: false,
        format: Some(Format::Raw),
        direct: false,
        backing: false,
        stripe: Vec::new(),
        engine: Engine::Auto,
    };
    (path, spec)
}

fn block(spec: &Spec, queues: u16) -> Block {
    let image = Image::open(spec).unwrap();
    Block::new("disk0", image, None, queues, || Box::new(|| Ok(()))).unwrap()
}

fn activation(ram: &GuestRam, drivers: &[Driver], features: u64, event_idx: bool) -> Activation {
    Activation {
        ram: ram.clone(),
        features,
        queues: drivers
            .iter()
            .map(|driver| driver.queue(event_idx))
            .collect(),
        interrupt: Arc::clone(&drivers[0].interrupts) as _,
    }
}

fn driver(ram: &GuestRam, index: u16) -> Driver {
    Driver::new(ram, index, u64::from(index) * 0x1_0000, QUEUE_SIZE)
}

fn put_header(ram: &GuestRam, at: u64, kind: u32, sector: u64) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    ram.write_slice(&header, GuestAddress(at)).unwrap();
}

fn bytes_at(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn status(ram: &GuestRam) -> u8 {
    ram.read_obj(GuestAddress(STATUS_AT)).unwrap()
}

/// A disk with one queue whose handler runs where the test says, not on a
/// worker.
struct Bench {
    _dir: tempfile::TempDir,
    path: PathBuf,
    ram: GuestRam,
    driver: Driver,
    block: Block,
    handler: Box<dyn QueueHandler>,
}

impl Bench {
    fn new(features: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (path, spec) = image_of(dir.path(), 1 << 20);
        Self::on(dir, path, &spec, features)
    }

    fn on(dir: tempfile::TempDir, path: PathBuf, spec: &Spec, features: u64) -> Self {
        let ram = testing::ram(RAM);
        let driver = driver(&ram, 0);
        let mut block = block(spec, 1);
        let activation = activation(&ram, std::slice::from_ref(&driver), features, true);
        let handler = block.activate(activation).unwrap().remove(0);
        Self {
            _dir: dir,
            path,
            ram,
            driver,
            block,
            handler,
        }
    }

    /// Serves what is in the ring until it is done.
    fn serve(&mut self) {
        self.handler.kick();
        self.handler.quiesce();
    }

    /// One request to its end: `(address, length, device writes)` for its data.
    /// Bytes that the device claims to have written, and the status.
    fn ask(&mut self, kind: u32, sector: u64, data: &[testing::Buffer]) -> (u32, u8) {
        put_header(&self.ram, HEADER_AT, kind, sector);
        self.ram
            .write_obj(NO_STATUS, GuestAddress(STATUS_AT))
            .unwrap();
        let mut buffers = vec![(HEADER_AT, 16, false)];
        buffers.extend(data);
        buffers.push((STATUS_AT, 1, true));
        let head = self.driver.add(&buffers);
        self.serve();
        let (used, len) = self.driver.used().unwrap();
        assert_eq!(used, head);
        (len, status(&self.ram))
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.ram.write_slice(bytes, GuestAddress(DATA_AT)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.ask(VIRTIO_BLK_T_OUT, sector, &[(DATA_AT, len, false)])
            .1
    }

    fn read(&mut self, sector: u64, len: u32) -> Vec<u8> {
        let answer = self.ask(VIRTIO_BLK_T_IN, sector, &[(DATA_AT, len, true)]);
        assert_eq!(answer, (len + 1, Status::Ok as u8));
        bytes_at(&self.ram, DATA_AT, len as usize)
    }

    fn flush(&mut self) -> u8 {
        self.ask(VIRTIO_BLK_T_FLUSH, 0, &[]).1
    }

    fn counter(&self, name: &str) -> u64 {
        let all = self.block.metrics();
        all.iter().find(|(other, _)| *other == name).unwrap().1
    }
}
