//! Every engine against a model in memory, and everything that can be wrong
//! with an image.

mod access;
mod confined;
mod engines;
mod full;
mod images;
mod late;
mod overlay;

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use blanket_memory::IoVec;

use super::{
    Completion, Engine, Format, Image, Operation, Request, Spec, Store, ThreadSetup, is_full,
};

fn spec(path: &Path) -> Spec {
    Spec {
        path: path.to_owned(),
        readonly: false,
        format: Some(Format::Raw),
        direct: false,
        backing: true,
        engine: Engine::Auto,
        stripe: Vec::new(),
    }
}

fn queue(image: &Image) -> Box<dyn Store> {
    image.queue(8, &|| Box::new(|| Ok(()))).unwrap()
}

/// A request without memory.
fn plain(operation: Operation, offset: u64, len: u64) -> Request {
    Request {
        operation,
        offset,
        len,
        vectors: Vec::new(),
        token: 0,
    }
}

/// A read or write of `bytes`, in pieces that end at `cuts`.
fn transfer(operation: Operation, offset: u64, bytes: &mut [u8], cuts: &[usize]) -> Request {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    let base = bytes.as_mut_ptr();
    Request {
        vectors: cuts
            .windows(2)
            .map(|pair| IoVec::new(base.wrapping_add(pair[0]), pair[1] - pair[0]))
            .collect(),
        ..plain(operation, offset, 0)
    }
}

/// Whether the store's event comes within `timeout` milliseconds.
fn event_within(store: &dyn Store, timeout: libc::c_int) -> bool {
    let mut fd = libc::pollfd {
        fd: store.event(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut fd, 1, timeout) == 1 }
}

/// Waits for the store's event.
fn wait(store: &dyn Store) {
    assert!(event_within(store, 30_000), "no completion within 30 s");
}

/// Runs one request to its end, waiting by the event as a device does.
fn run(store: &mut dyn Store, request: Request) -> io::Result<u32> {
    let token = request.token;
    // SAFETY: the callers keep the memory until this returns.
    unsafe { store.submit(request) }.unwrap();
    store.commit().unwrap();
    let mut done: Vec<Completion> = Vec::new();
    while done.is_empty() {
        wait(store);
        store.complete(&mut done);
    }
    assert_eq!((done.len(), store.in_flight()), (1, 0));
    let completion = done.remove(0);
    assert_eq!(completion.token, token);
    completion.result
}

fn write(store: &mut dyn Store, offset: u64, mut bytes: Vec<u8>) -> io::Result<u32> {
    let request = transfer(Operation::Write, offset, &mut bytes, &[]);
    run(store, request)
}

fn read(store: &mut dyn Store, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let request = transfer(Operation::Read, offset, &mut bytes, &[]);
    run(store, request).map(|n| {
        assert_eq!(n as usize, len);
        bytes
    })
}

/// A raw image of `len` bytes that all say `fill`.
fn raw_image(dir: &Path, len: usize, fill: u8) -> PathBuf {
    let path = dir.join("disk.raw");
    std::fs::write(&path, vec![fill; len]).unwrap();
    path
}

/// Whether `qemu-img` is there; says so if not.
fn have_qemu_img() -> bool {
    let have = Command::new("qemu-img").arg("--version").output().is_ok();
    if !have {
        eprintln!("skipped, because there is no qemu-img (package qemu-utils)");
    }
    have
}

/// Runs `qemu-img` in `dir`; what it said.
fn qemu_img(dir: &Path, args: &[&str]) -> String {
    let output = Command::new("qemu-img")
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {said}{complained}"
    );
    said
}
