//! Compiles `proto/` into message types, service traits, the descriptor set that reflection serves, and the method table.

use std::{env, error::Error, fmt::Write, fs, path::PathBuf};

use protox::prost_reflect::{DescriptorPool, MethodDescriptor};

const PACKAGE: &str = "issuetracker.v1";

/// The messages that contain passwords or tokens. `src/pb.rs` implements `Debug` for them without the secrets.
const WITH_SECRETS: [&str; 6] = [
    "LoginRequest",
    "LoginResponse",
    "CreateUserRequest",
    "ResetPasswordRequest",
    "ChangePasswordRequest",
    "CreateApiTokenResponse",
];

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
    fs::write(out.join("method_table.rs"), method_table(&compiler.descriptor_pool())?)?;
    tonic_prost_build::configure()
        .build_server(env::var_os("CARGO_FEATURE_SERVER").is_some())
        .bytes(".issuetracker.v1.ImportChunk")
        .skip_debug(WITH_SECRETS.map(|message| format!(".{PACKAGE}.{message}")))
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

/// Returns the array that `src/middleware/method_table.rs` includes: one `MethodPolicy` per method, ordered by path.
fn method_table(pool: &DescriptorPool) -> Result<String, Box<dyn Error>> {
    let services = pool.services().filter(|service| service.package_name() == PACKAGE);
    let mut policies = Vec::new();
    for method in services.flat_map(|service| service.methods().collect::<Vec<_>>()) {
        let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        policies.push((method_policy(pool, &method, &path)?, path));
    }
    policies.sort_by(|left, right| left.1.cmp(&right.1));

    let mut table = String::from("[\n");
    for (policy, _) in policies {
        writeln!(table, "    {policy},")?;
    }
    table.push_str("]\n");
    Ok(table)
}

/// Returns the `MethodPolicy` of one method as Rust source.
///
/// Fails if the method declares no required role. The options come from protox's descriptors: prost drops extensions.
fn method_policy(pool: &DescriptorPool, method: &MethodDescriptor, path: &str) -> Result<String, Box<dyn Error>> {
    let options = method.options();
    let idempotency = method.method_descriptor_proto().options.as_ref().map(|options| options.idempotency_level());
    let only_reads = idempotency.is_some_and(|level| level.as_str_name() == "NO_SIDE_EFFECTS");

    let extension = pool.get_extension_by_name(&format!("{PACKAGE}.required_role")).ok_or("no required_role option")?;
    let number = options.get_extension(&extension).as_enum_number().unwrap_or_default();
    let roles = pool.get_enum_by_name(&format!("{PACKAGE}.RequiredRole")).ok_or("no RequiredRole enum")?;
    let role = match roles.get_value(number).as_ref().map(|value| value.name()) {
        Some("REQUIRED_ROLE_UNAUTHENTICATED") => "Unauthenticated",
        Some("REQUIRED_ROLE_VIEWER") => "Viewer",
        Some("REQUIRED_ROLE_MEMBER") => "Member",
        Some("REQUIRED_ROLE_ADMIN") => "Admin",
        _ => return Err(format!("{path}: no required role; declare option ({PACKAGE}.required_role)").into()),
    };
    let number_of = |name: &str| -> Result<Option<u32>, String> {
        let extension = pool.get_extension_by_name(&format!("{PACKAGE}.{name}")).ok_or(format!("no {name} option"))?;
        Ok(options.has_extension(&extension).then(|| options.get_extension(&extension).as_u32()).flatten())
    };
    Ok(format!(
        "MethodPolicy {{ path: {path:?}, service: {:?}, method: {:?}, client_streaming: {}, server_streaming: {}, \
         only_reads: {only_reads}, required_role: RequiredRole::{role}, default_deadline_seconds: {:?}, \
         max_response_kib: {:?}, max_response_per_request: {:?} }}",
        method.parent_service().full_name(),
        method.name(),
        method.is_client_streaming(),
        method.is_server_streaming(),
        number_of("default_deadline_seconds")?,
        number_of("max_response_kib")?,
        number_of("max_response_per_request")?,
    ))
}
