//! `blanket net capture`.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use blanket_overlay::api::observe::{CAPTURE, CaptureSpec};
use blanket_overlay::capture::{Block, Direction, Reader, describe};
use chrono::DateTime;
use hyper::Method;
use tokio::signal::unix::{SignalKind, signal};

use crate::daemon::http;
use crate::home::Home;
use crate::switch::{call, connect, runtime};

/// How long the rest of a capture may take to come.
const REST: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub(crate) struct CaptureArgs {
    /// A port, a network or a peer (port:, network: or peer: before its name says which), or all.
    #[arg(default_value = "all")]
    of: String,
    /// Only what this matches, as flows do: tcp,tp_dst=80
    filter: Vec<String>,
    /// Write a capture that tcpdump and Wireshark read (pcapng) to this file; -: to standard output.
    #[arg(short, long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// End after so many frames.
    #[arg(short, long, value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Bytes of each frame at most; 0: all.
    #[arg(short, long, default_value_t = 0)]
    snaplen: u32,
    /// Only frames that come into the switch, or that go out of it.
    #[arg(short = 'Q', long, value_name = "in|out|inout", default_value = "inout", value_parser = ["in", "out", "inout"])]
    direction: String,
    /// Show the frames that are dropped instead, each with the reason.
    #[arg(long)]
    drops: bool,
}

pub(super) fn direction(text: &str) -> Option<Direction> {
    match text {
        "in" => Some(Direction::In),
        "out" => Some(Direction::Out),
        _ => None,
    }
}

/// Where a capture goes.
enum To {
    /// A file or a pipe, as it is.
    Raw(Box<dyn Write>),
    /// Standard output, a line for each frame.
    Lines,
}

/// What was heard of a capture.
#[derive(Default)]
struct Heard {
    interfaces: Vec<String>,
    /// Of those interfaces: what was to be captured, and was not.
    received: u64,
    dropped: u64,
    frames: u64,
}

pub(super) fn capture(home: &Home, args: &CaptureArgs) -> Result<ExitCode> {
    let mut to = match &args.write {
        None => To::Lines,
        Some(path) if path.as_os_str() == "-" => To::Raw(Box::new(std::io::stdout())),
        Some(path) => {
            let file = File::create(path);
            let file = file.with_context(|| format!("cannot write {}", path.display()))?;
            To::Raw(Box::new(file))
        }
    };
    let spec = CaptureSpec {
        of: args.of.clone(),
        filter: args.filter.join(" "),
        // A line needs no more than the head.
        snaplen: match (args.snaplen, &to) {
            (0, To::Lines) => 256,
            (snaplen, _) => snaplen,
        },
        count: args.count,
        direction: direction(&args.direction),
        drops: args.drops,
    };
    let mut heard = Heard::default();
    let done = runtime()?.block_on(receive(home, &spec, &mut to, &mut heard));
    match done {
        // Whoever reads has had enough.
        Err(error) if is_closed(&error) => {}
        done => done?,
    }
    let Heard {
        frames,
        received,
        dropped,
        ..
    } = heard;
    eprintln!("{frames} frames captured");
    eprintln!("{} frames received by filter", received.max(frames));
    eprintln!("{dropped} frames left out by the switch, because they were not taken fast enough");
    Ok(ExitCode::SUCCESS)
}

fn is_closed(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

async fn receive(home: &Home, spec: &CaptureSpec, to: &mut To, heard: &mut Heard) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let io = connect(home).await?;
    let mut capture = http::download(io, Method::POST, "/captures", Some(spec)).await?;
    let number = capture.header(CAPTURE).unwrap_or("0").to_owned();
    if matches!(to, To::Lines) {
        eprintln!("capturing at {}; Ctrl-C ends it", spec.of);
    }
    let mut reader = Reader::default();
    loop {
        let bytes = tokio::select! {
            bytes = capture.chunk() => bytes?,
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        };
        let Some(bytes) = bytes else { return Ok(()) };
        heard.take(&mut reader, &bytes, to)?;
    }
    // It says what became of the frames, and ends.
    let path = format!("/captures/{number}");
    let _: bool = call(home, Method::DELETE, &path, None::<&()>).await?;
    let rest = async {
        while let Some(bytes) = capture.chunk().await? {
            heard.take(&mut reader, &bytes, to)?;
        }
        Ok(())
    };
    tokio::time::timeout(REST, rest).await.unwrap_or(Ok(()))
}

impl Heard {
    fn take(&mut self, reader: &mut Reader, bytes: &[u8], to: &mut To) -> Result<()> {
        if let To::Raw(file) = to {
            file.write_all(bytes)?;
            file.flush()?;
        }
        reader.put(bytes);
        let mut text = String::new();
        while let Some(block) = reader.take()? {
            match block {
                Block::Interface(name) => self.interfaces.push(name),
                Block::Statistics { received, dropped } => {
                    self.received += received;
                    self.dropped += dropped;
                }
                Block::Frame { .. } => {
                    self.frames += 1;
                    if matches!(to, To::Lines) {
                        text.push_str(&self.line(&block));
                    }
                }
                Block::Other => {}
            }
        }
        if !text.is_empty() {
            let mut out = std::io::stdout().lock();
            out.write_all(text.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    }

    fn line(&self, block: &Block) -> String {
        let Block::Frame {
            interface,
            direction,
            time,
            bytes,
            len,
            comment,
        } = block
        else {
            return String::new();
        };
        let name = self.interfaces.get(*interface as usize);
        let name = name.map_or("?", String::as_str);
        let way = match direction {
            Direction::In => "In ",
            Direction::Out => "Out",
        };
        let at = DateTime::from_timestamp(time.as_secs().cast_signed(), time.subsec_nanos());
        let at = at.unwrap_or_default();
        let what = describe(bytes, *len as usize);
        let comment = match comment.as_str() {
            "" => String::new(),
            comment => format!(" ({comment})"),
        };
        let at = at.format("%H:%M:%S%.6f");
        format!("{at} {name} {way} {what}{comment}\n")
    }
}
