//! Runs the program and reads its output.

use super::*;

impl Dir {
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        fs::write(self.path(name), bytes).unwrap();
        self.text(name)
    }

    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(&**self).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// The exit code and output of a finished program.
#[derive(Debug)]
pub struct ProgramOutput {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl ProgramOutput {
    pub fn of(child: Child) -> Self {
        let output = finished(child);
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    pub fn assert_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    #[track_caller]
    pub fn assert_prints(&self, text: &str) {
        assert!(self.stdout.contains(text) || self.stderr.contains(text), "{text:?} is not in {self:#?}");
    }

    pub fn json(&self, kind: &str) -> Vec<Value> {
        let objects = self.stdout.lines().map(|line| serde_json::from_str::<Value>(line).expect(line));
        objects.filter_map(|mut object| object.get_mut(kind).map(Value::take)).collect()
    }
}

impl Service {
    /// Starts the service on its embedded database.
    pub fn embedded(dir: &Dir, listen: &str) -> Self {
        Self::start(dir, program(&["--listen", listen, "--data-dir", &dir.data()]))
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let (subcommand, args) = args.split_first().unwrap();
        let token_file = self.dir.join(TOKEN_FILE).display().to_string();
        program(&[&[subcommand, "--server", &self.address, "--token-file", &token_file], args].concat())
    }

    pub fn run(&self, args: &[&str]) -> ProgramOutput {
        ProgramOutput::of(self.command(args).spawn().unwrap())
    }

    /// Returns the titles of all issues, sorted.
    pub async fn titles(&self) -> Vec<String> {
        let mut titles = titles(self, &self.admin_token()).await;
        titles.sort();
        titles
    }
}
