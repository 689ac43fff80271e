//! Calls that several tests make.

use issue_tracker::pb::{ListIssuesRequest, issue_service_client::IssueServiceClient};
use tonic::{Request, metadata::MetadataValue};

use super::service::Service;

pub fn with_token<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", MetadataValue::try_from(format!("Bearer {token}")).unwrap());
    request
}

/// Returns the titles of all issues, newest first.
pub async fn titles(service: &Service, token: &str) -> Vec<String> {
    let mut issues = IssueServiceClient::new(service.channel());
    let (mut titles, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListIssuesRequest { page_size: 1_000, page_token, ..Default::default() };
        let page = issues.list_issues(with_token(token, request)).await.unwrap().into_inner();
        titles.extend(page.issues.into_iter().map(|issue| issue.title));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return titles;
        }
    }
}
