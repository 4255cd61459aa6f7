//! Format, lints, dependencies.

use anyhow::Result;

use super::Session;
use crate::setup;

impl Session<'_> {
    /// Runs all checks, unless a filter asks for certain tests only.
    pub(super) fn checks(&mut self) -> Result<()> {
        if self.options.filter.is_some() {
            return Ok(());
        }
        self.formats();
        self.lints();
        self.dependencies()
    }

    fn formats(&mut self) {
        let mut command = self.workspace.cargo();
        command.args(["fmt", "--all", "--check"]);
        self.check("format", command);
        for name in ["firmware", "fuzz"] {
            let mut command = self.workspace.cargo_in(name);
            command.args(["fmt", "--check"]);
            self.check(&format!("format of {name}"), command);
        }
    }

    fn lints(&mut self) {
        const DENY: [&str; 3] = ["--", "-D", "warnings"];
        let mut command = self.workspace.cargo();
        command
            .args(["clippy", "--workspace", "--all-targets"])
            .args(DENY);
        self.check("lints", command);
        let mut command = self.workspace.cargo_in("firmware");
        command.args(["clippy", "--release"]).args(DENY);
        self.check("lints of firmware", command);
        let mut command = self.workspace.cargo_in("fuzz");
        // Without its default feature the fuzzing engine is not compiled.
        command.args(["clippy", "--no-default-features"]).args(DENY);
        self.check("lints of fuzz", command);
    }

    /// Licences, bans and sources. Advisories change by the day and need the
    /// network, so they are not part of a test of this tree.
    fn dependencies(&mut self) -> Result<()> {
        const NAME: &str = "dependencies";
        setup::cargo_deny(self.progress)?;
        for (name, manifest) in [
            (NAME.to_owned(), "Cargo.toml"),
            (format!("{NAME} of fuzz"), "fuzz/Cargo.toml"),
        ] {
            let mut command = self.workspace.cargo();
            command
                .args(["deny", "--manifest-path", manifest])
                .args(["--config", "deny.toml", "check"])
                .args(["--hide-inclusion-graph", "licenses", "bans", "sources"]);
            self.check(&name, command);
        }
        Ok(())
    }
}
