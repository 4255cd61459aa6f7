//! The end that keeps a replica: `blanket receive`, for a VM that does not come.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use blanket_migration::Destination;

use super::image::Image;
use super::store::{Record, Session, Store, seed};
use crate::cluster::parcel::{Go, MAX_ITEMS, Parcel, What, hear};
use crate::commands::migrate::folder::{Owner, is_room_for};
use crate::commands::migrate::receive::{MAX_BOOT, MEMORY, answer, take_bytes};
use crate::daemon::random_text;
use crate::failure::failure;
use crate::home::Home;
use crate::name::VmName;

/// Keeps a replica up to date for as long as the other node sends points.
pub(crate) fn stand_by(
    home: &Home,
    stage: &Path,
    stream: &mut UnixStream,
    parcel: &Parcel,
    owner: Owner,
) -> Result<ExitCode> {
    let (store, session) = answer(stream, || begin(home, parcel, owner))?;
    for item in &parcel.files {
        let path = store.path.join(match item.what {
            What::Kernel => "kernel".to_owned(),
            What::Initrd => "initrd".to_owned(),
            What::Disk(index) => format!("{index}.img"),
        });
        let taken = take_file(stream, &path, item.what, item.len);
        answer(stream, || taken)?;
    }
    let go: Go = hear(stream)?;
    answer(stream, || session.configure(go.config))?;
    let met = Destination::meet(&stage.join(MEMORY));
    let (source, _) = met.context("cannot reach the VM's monitor")?;
    source.stand_by(&session)?;
    Ok(ExitCode::SUCCESS)
}

/// Takes a file in place of the one that is there.
fn take_file(stream: &mut UnixStream, path: &Path, what: What, len: u64) -> Result<()> {
    let boot = !matches!(what, What::Disk(_));
    anyhow::ensure!(!boot || len <= MAX_BOOT, "its kernel is too large");
    let new = path.with_extension("new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options
        .open(&new)
        .with_context(|| format!("cannot make {}", new.display()))?;
    take_bytes(stream, &mut file, &new, len)?;
    fs::rename(&new, path).with_context(|| format!("cannot make {}", path.display()))
}

/// Makes a replica, or takes up the one that is there.
fn begin(home: &Home, parcel: &Parcel, owner: Owner) -> Result<(Store, Session)> {
    let name: VmName = parcel.name.parse().map_err(anyhow::Error::msg)?;
    anyhow::ensure!(
        parcel.files.len() <= MAX_ITEMS && parcel.disks.len() <= MAX_ITEMS,
        "the VM has too many disks"
    );
    let before = before(home, &name, &owner)?;
    let store = Store::of(home, &name);
    store.make()?;
    let lock = store.lock()?;
    let known = store.read()?;
    if let Some(known) = &known {
        if known.owner != owner {
            return Err(failure(
                format!(
                    "there is a replica of another VM '{name}' of {} there",
                    known.owner.from
                ),
                format!("remove it there if nobody needs it: blanket replicas --remove {name}"),
            ));
        }
        if known.point.is_some() && known.disks.len() != parcel.disks.len() {
            return Err(failure(
                format!("the replica of '{name}' there has other disks"),
                format!("remove it there, and replicate anew: blanket replicas --remove {name}"),
            ));
        }
    }
    let fresh = known.is_none();
    let needed = parcel.disks.iter().map(|disk| disk.used.min(disk.capacity));
    let needed = needed.fold(0, u64::saturating_add);
    if fresh {
        is_room_for(&store.path, needed)?;
    }
    let mut record = Record {
        owner,
        name: parcel.name.clone(),
        config: known.as_ref().and_then(|known| known.config.clone()),
        disks: parcel.disks.clone(),
        point: known.and_then(|known| known.point),
        session: random_text()?,
    };
    // It counts from here on.
    store.write(&record)?;
    let images = store.images(&record.disks)?;
    let disks: Vec<_> = images.iter().map(Image::content).collect();
    store.settle(&mut record, &disks)?;
    store.tidy();
    if fresh {
        for (image, disk) in images.iter().zip(&record.disks) {
            let Some(path) = before.get(disk.index) else {
                continue;
            };
            // It only saves time.
            if let Err(error) = seed(image, path, disk.capacity) {
                tracing::info!("{} is of no use: {error:#}", path.display());
            }
        }
    }
    let session = Session::new(store.clone(), &record, disks, lock);
    Ok((store, session))
}

/// The disks that the same VM had here, if it was here and does not run; the
/// replica begins with what is on them.
fn before(home: &Home, name: &VmName, owner: &Owner) -> Result<Vec<PathBuf>> {
    let Ok(vm) = home.existing(name) else {
        return Ok(Vec::new());
    };
    if vm.known_identity().as_ref() != Some(&owner.id) {
        return Ok(Vec::new());
    }
    if vm.process()?.is_some() {
        return Err(failure(
            format!("'{name}' runs there itself: it was promoted, or moved"),
            "there can be one of them only: stop one",
        ));
    }
    let config = vm.stored_config().unwrap_or_default();
    let plain = config.disk.iter().map(|disk| match disk.stripe.is_empty() {
        true => disk.path.clone(),
        false => PathBuf::new(),
    });
    Ok(plain.collect())
}
