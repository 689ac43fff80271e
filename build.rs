//! Compiles `proto/` into message types, service traits and the descriptor set that reflection serves.

use std::{env, error::Error, fs, path::PathBuf};

/// The messages with passwords and tokens: `src/lib.rs` says what is printed of them.
const WITH_SECRETS: [&str; 5] =
    ["LoginRequest", "LoginResponse", "CreateUserRequest", "ChangePasswordRequest", "CreateApiTokenResponse"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=migrations");

    let mut files = fs::read_dir("proto/issuetracker/v1")?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()?;
    files.sort();

    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_source_info(true).include_imports(true).open_files(files)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptor.bin"), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        .bytes(".issuetracker.v1.ImportChunk")
        .skip_debug(WITH_SECRETS.map(|message| format!(".issuetracker.v1.{message}")))
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
