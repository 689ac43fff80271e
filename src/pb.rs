//! The messages, clients and service traits generated from `proto/`. For example, an import:
//!
//! ```no_run
//! use issue_tracker::pb::{
//!     ImportChunk, ImportIssuesRequest, ImportOptions, import_issues_request::Message,
//!     import_service_client::ImportServiceClient,
//! };
//!
//! async fn import(address: String, token: &str, file: Vec<u8>) -> Result<(), Box<dyn std::error::Error>> {
//!     let message = |message| ImportIssuesRequest { message: Some(message) };
//!     let mut messages = vec![message(Message::Options(ImportOptions::default()))];
//!     for (nth, data) in file.chunks(256 * 1024).enumerate() {
//!         let offset = nth as i64 * 256 * 1024;
//!         messages.push(message(Message::Chunk(ImportChunk { offset, data: data.to_vec().into() })));
//!     }
//!     let mut request = tonic::Request::new(tokio_stream::iter(messages));
//!     request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
//!
//!     let mut responses = ImportServiceClient::connect(address).await?.import_issues(request).await?.into_inner();
//!     while let Some(response) = responses.message().await? {
//!         println!("{response:?}");
//!     }
//!     Ok(())
//! }
//! ```

// The generator does not keep the indentation of lists in comments.
#![allow(clippy::doc_lazy_continuation)]

tonic::include_proto!("issuetracker.v1");

/// Prints of a message with secrets only the fields that are named here.
macro_rules! debug_without_secrets {
    ($($message:ident: $($field:ident),+;)+) => {$(
        impl std::fmt::Debug for $message {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($message))$(.field(stringify!($field), &self.$field))+.finish_non_exhaustive()
            }
        }
    )+
    #[cfg(test)]
    const WITH_SECRETS: &[&str] = &[$(stringify!($message)),+];
    };
}
debug_without_secrets! {
    // People type their password as the username, too.
    LoginRequest: validate_only;
    LoginResponse: expire_time, user;
    CreateUserRequest: user, request_id, validate_only;
    ResetPasswordRequest: user_id, request_id, validate_only;
    ChangePasswordRequest: request_id, validate_only;
    CreateApiTokenResponse: api_token;
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn the_messages_with_secrets_are_those_with_a_password_or_a_token() {
        let files = prost_types::FileDescriptorSet::decode(crate::FILE_DESCRIPTOR_SET).unwrap().file;
        let ours = files.iter().filter(|file| file.package() == "issuetracker.v1");
        let messages = ours.flat_map(|file| &file.message_type);
        let secret = |name: &str| name.ends_with("password") || name == "access_token";
        let found = messages.filter(|message| message.field.iter().any(|field| secret(field.name())));
        let mut found: Vec<_> = found.map(|message| message.name()).collect();
        let mut known = WITH_SECRETS.to_vec();
        found.sort_unstable();
        known.sort_unstable();
        assert_eq!(found, known);
    }

    #[test]
    fn messages_with_secrets_are_printed_without_them() {
        const SECRET: &str = "correct horse";
        let secret = || SECRET.to_owned();
        let user = || Some(User { username: "ada".into(), ..User::default() });
        let printed = [
            format!("{:?}", LoginRequest { username: secret(), password: secret(), validate_only: true }),
            format!("{:?}", LoginResponse { access_token: secret(), user: user(), ..LoginResponse::default() }),
            format!("{:#?}", CreateUserRequest { password: secret(), user: user(), ..CreateUserRequest::default() }),
            format!(
                "{:?}",
                ChangePasswordRequest {
                    current_password: secret(),
                    new_password: secret(),
                    request_id: "an id".into(),
                    validate_only: true,
                }
            ),
            format!(
                "{:?}",
                ResetPasswordRequest {
                    user_id: "an id".into(),
                    new_password: secret(),
                    ..ResetPasswordRequest::default()
                }
            ),
            format!(
                "{:?}",
                CreateApiTokenResponse {
                    access_token: secret(),
                    api_token: Some(ApiToken { name: "ada".into(), ..ApiToken::default() }),
                }
            ),
        ];
        for (printed, shown) in printed.iter().zip(["validate_only: true", "ada", "ada", "an id", "an id", "ada"]) {
            assert!(!printed.contains(SECRET) && printed.contains(shown), "{printed}");
        }
    }
}
