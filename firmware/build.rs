//! Links each payload without libc or start files, at the addresses that its
//! linker script states.

/// Each payload and the linker script that lays it out.
const SCRIPTS: [(&str, &str); 7] = [
    ("hello", "pvh.ld"),
    ("count", "pvh.ld"),
    ("idle", "pvh.ld"),
    ("evil", "pvh.ld"),
    ("evil-pv", "pv.ld"),
    ("ring3", "ring3.ld"),
    ("floor", "floor.ld"),
];

fn main() {
    let dir = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    for (bin, script) in SCRIPTS {
        println!("cargo:rerun-if-changed={script}");
        for arg in [
            "-nostartfiles",
            "-nostdlib",
            "-static",
            "-no-pie",
            "-Wl,--build-id=none",
            "-Wl,-z,norelro",
        ] {
            println!("cargo:rustc-link-arg-bin={bin}={arg}");
        }
        println!("cargo:rustc-link-arg-bin={bin}=-Wl,-T,{dir}/{script}");
    }
}
