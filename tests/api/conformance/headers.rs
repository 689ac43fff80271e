//! Request headers.

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method};
use tonic::Code;

use super::{
    Target, WHO_AM_I,
    http2::{
        END_HEADERS, END_STREAM, GOAWAY, HEADERS, Outcome, RST_STREAM, RawConnection, block, call, frame, framed,
        request,
    },
};

#[tokio::test]
async fn unknown_path_is_unimplemented_with_http_status_200() {
    let target = Target::start().await;
    for path in
        ["/issuetracker.v1.IssueService/Nothing", "/issuetracker.v1.Nothing/Get", "/a.b/C", "/", "/a", "//", "/%00"]
    {
        call(&target, request(&target, path), framed(b"")).await.assert_grpc(Code::Unimplemented);
    }
    let long = format!("/issuetracker.v1.AuthService/{}", "x".repeat(10_000));
    call(&target, request(&target, &long), framed(b"")).await.assert_grpc(Code::Unimplemented);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn content_type_other_than_grpc_is_rejected_with_http_status_415() {
    let target = Target::start().await;
    for content_type in
        [None, Some("application/json"), Some("text/html"), Some(""), Some("application/"), Some("grpc")]
    {
        let mut request = request(&target, WHO_AM_I);
        request.headers_mut().remove("content-type");
        if let Some(content_type) = content_type {
            request.headers_mut().insert("content-type", content_type.parse().unwrap());
        }
        let response = call(&target, request, framed(b"")).await;
        assert!(matches!(response, Outcome::Status { http: 415, .. }), "{content_type:?}: {response:?}");
    }
    // The service ignores the message format after the plus.
    for content_type in ["application/grpc", "application/grpc+proto", "application/grpc+json"] {
        let mut request = request(&target, WHO_AM_I);
        request.headers_mut().insert("content-type", content_type.parse().unwrap());
        call(&target, request, framed(b"")).await.assert_grpc(Code::Ok);
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn http_method_other_than_post_is_rejected_with_http_status_405() {
    let target = Target::start().await;
    for method in [Method::GET, Method::HEAD, Method::PUT, Method::DELETE, Method::OPTIONS, Method::PATCH] {
        let mut request = request(&target, WHO_AM_I);
        *request.method_mut() = method.clone();
        let response = call(&target, request, Bytes::new()).await;
        assert!(matches!(response, Outcome::Status { http: 405, .. }), "{method}: {response:?}");
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn missing_te_header_is_accepted() {
    let target = Target::start().await;
    let mut without = request(&target, WHO_AM_I);
    without.headers_mut().remove("te");
    call(&target, without, framed(b"")).await.assert_grpc(Code::Ok);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn malformed_grpc_timeout_is_ignored_and_a_zero_one_has_passed() {
    let target = Target::start().await;
    let with_timeout = |timeout: &str| {
        let mut request = request(&target, WHO_AM_I);
        request.headers_mut().insert("grpc-timeout", HeaderValue::from_bytes(timeout.as_bytes()).unwrap());
        request
    };
    for ignored in ["", "S", "5", "-1S", "1.5S", "1x", "abc", "1 S", "123456789S", "99999999999999999999n", "é1S"] {
        call(&target, with_timeout(ignored), framed(b"")).await.assert_grpc(Code::Ok);
    }
    for long in ["99999999H", "99999999M", "99999999S", "10S"] {
        call(&target, with_timeout(long), framed(b"")).await.assert_grpc(Code::Ok);
    }
    // A call that needs the database cannot finish in time.
    for passed in ["0H", "0n", "1n"] {
        let mut create = with_timeout(passed);
        *create.uri_mut() = request(&target, "/issuetracker.v1.IssueService/CreateIssue").uri().clone();
        call(&target, create, framed(b"\x0a\x06\x12\x04late")).await.assert_grpc(Code::DeadlineExceeded);
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn unknown_and_malformed_metadata_is_ignored() {
    let target = Target::start().await;
    for (name, value) in [
        ("x-trace-bin", &b"not base64 !!!"[..]),
        ("x-trace-bin", b"\xff\xfe\xfd"),
        ("grpc-status-details-bin", b"%%%%"),
        ("grpc-status", b"\x80\x81 99999999999"),
        ("grpc-message", b"%zz%"),
        ("grpc-accept-encoding", b"\xff, , ,gzip"),
        ("grpc-encoding", b"identity"),
        ("grpc-trace-bin", b""),
    ] {
        let mut request = request(&target, WHO_AM_I);
        request.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_bytes(value).unwrap());
        let response = call(&target, request, framed(b"")).await;
        assert!(matches!(response, Outcome::Status { http: 200, grpc: Some(0) }), "{name}: {response:?}");
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn malformed_authorization_header_is_unauthenticated() {
    let target = Target::start().await;
    for value in [&b"Bearer \xff\xfe"[..], b"\x80", b"Bearer \xc3\xa9", b"", b"Bearer", b"Bearer \t", b"\tBearer x"] {
        let mut request = request(&target, WHO_AM_I);
        request.headers_mut().insert("authorization", HeaderValue::from_bytes(value).unwrap());
        call(&target, request, framed(b"")).await.assert_grpc(Code::Unauthenticated);
    }
    // Control characters are not allowed in a header value: the stream or the connection ends.
    for value in [&b"Bearer \x00"[..], b"Bearer \x01", b"Bearer \r\nx: y", b"\x7f"] {
        let mut raw = RawConnection::begin(&target, &[]).await;
        let path = WHO_AM_I.as_bytes();
        let headers: [(&str, &[u8]); 6] = [
            (":method", b"POST"),
            (":scheme", b"http"),
            (":path", path),
            (":authority", b"tracker"),
            ("content-type", b"application/grpc"),
            ("authorization", value),
        ];
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&headers))).await;
        loop {
            match raw.next().await {
                None => break,
                Some(frame) if matches!(frame.kind, RST_STREAM | GOAWAY) => break,
                Some(frame) => assert_ne!(frame.kind, HEADERS, "{value:?} gets a response"),
            }
        }
    }
    target.assert_unharmed().await;
}
