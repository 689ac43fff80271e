//! Calls that a viewer repeats.

use std::time::Duration;

use issue_tracker::pb::{
    ExportIssuesRequest, GetIssueRequest, GetResolutionLatencyRequest, GetTopAssigneesRequest, Issue, IssueScope,
    LatencyGroupBy, ListIssuesRequest, UpdateIssueRequest, WhoAmIRequest,
};
use tonic::{Code, Status};

use super::{Flood, REQUESTS_OF_ONE, Scene, list, ordinary, process::memory_kib, with_deadline};
use crate::{harness::Client, support::eventually::eventually};

/// Asserts that others succeed while a viewer has more concurrent lists of slow issues than slots, and that another user's list does.
async fn assert_lists_do_not_hurt(filter: &'static str) {
    Scene::run(async |scene| {
        scene.make_lists_slow().await;
        let viewer = scene.viewer();
        let flood = Flood::start(60, move |nth| {
            let viewer = viewer.clone();
            async move { list(&viewer, filter, nth).await }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        list(&scene.others[0].client, filter, 0).await.expect("another user's list is admitted");
        flood.stop_limited(&["Ok", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn lists_by_two_labels_and_priority_do_not_hurt_others() {
    assert_lists_do_not_hurt("label = a label = b priority = critical").await;
}

#[tokio::test]
async fn lists_by_priority_do_not_hurt_others() {
    assert_lists_do_not_hurt("priority = critical").await;
}

#[tokio::test]
async fn lists_by_eight_labels_do_not_hurt_others() {
    assert_lists_do_not_hurt("label=a label=b label=c label=d label=e label=f label=g label=h").await;
}

#[tokio::test]
async fn searches_do_not_hurt_others() {
    assert_lists_do_not_hurt("slow").await;
}

#[tokio::test]
async fn reports_of_both_kinds_do_not_hurt_others() {
    Scene::run(async |scene| {
        scene.make_lists_slow().await;
        let report = async |client: &Client, nth: usize| -> Result<(), Status> {
            let mut reports = client.reports();
            if nth.is_multiple_of(2) {
                let request = GetTopAssigneesRequest { scope: IssueScope::All.into(), ..Default::default() };
                return reports.get_top_assignees(ordinary(request)).await.map(drop);
            }
            let group_by = LatencyGroupBy::Label.into();
            let request = GetResolutionLatencyRequest { group_by, ..Default::default() };
            reports.get_resolution_latency(ordinary(request)).await.map(drop)
        };
        let viewer = scene.viewer();
        let flood = Flood::start(60, move |nth| {
            let viewer = viewer.clone();
            async move { report(&viewer, nth).await }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        report(&scene.others[0].client, 0).await.expect("another user's report is admitted");
        flood.stop_limited(&["Ok", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}

/// Exports all issues.
async fn export(client: &Client) -> Result<(), Status> {
    let mut chunks = client.issues().export_issues(ExportIssuesRequest::default()).await?.into_inner();
    while chunks.message().await?.is_some() {}
    Ok(())
}

#[tokio::test]
async fn exports_in_a_loop_leave_a_place_for_others() {
    Scene::run_with(&["--exports", "4", "--imports", "1"], async |scene| {
        scene.make_lists_slow().await;
        let viewer = scene.viewer();
        let flood = Flood::start(60, move |_| {
            let viewer = viewer.clone();
            async move { export(&viewer).await }
        });
        let flood = flood.await;
        export(&scene.others[0].client).await.expect("another user's export is admitted");
        scene.assert_others_succeed().await;
        flood.stop_limited(&["Ok", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn filters_of_many_shapes_do_not_hurt_others_or_fill_the_memory_of_the_database() {
    const SHAPES: usize = 300;
    const TERMS: [&str; 8] = [
        "priority = low",
        "status = open",
        "assignee = viewer",
        "reporter = member",
        "label = a",
        "assignee = none",
        "crash",
        "priority = high",
    ];
    Scene::run(async |scene| {
        let viewer = scene.viewer();
        let flood = Flood::start(40, move |nth| {
            let viewer = viewer.clone();
            // Each octal digit of the number is a term.
            let filter: Vec<_> = (0..4).map(|digit| TERMS[(nth % 4096) >> (3 * digit) & 7]).collect();
            async move { list(&viewer, &filter.join(" "), nth).await }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        eventually("there were many shapes", async || flood.begun() > SHAPES).await;
        flood.stop(&["Ok", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
        let pids =
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = current_database()";
        for row in scene.tracker.sql(pids, &[]).await {
            let kib = memory_kib(row.get::<_, i32>(0).cast_unsigned(), "RssAnon:");
            assert!(kib < 24 * 1024, "a backend has {kib} KiB of memory of its own");
        }
    })
    .await;
}

#[tokio::test]
async fn get_issue_1500_times_at_once_does_not_hurt_others() {
    const CONNECTIONS: usize = 6;
    Scene::run(async |scene| {
        let id = scene.others[0].issue_id.clone();
        let viewers: Vec<_> = (0..CONNECTIONS).map(|_| scene.viewer()).collect();
        let flood = Flood::start(1_500, move |nth| {
            let (mut issues, id) = (viewers[nth % CONNECTIONS].issues(), id.clone());
            async move { issues.get_issue(ordinary(GetIssueRequest { id, ..Default::default() })).await.map(drop) }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        flood.stop(&["Ok", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn calls_with_deadlines_of_300_us_do_not_hurt_others_or_open_database_sessions() {
    /// Sessions that are closed because their statement does not end in 100 ms on a busy machine.
    const SESSIONS_MAX: i64 = 10;
    Scene::run(async |scene| {
        let before = scene.sessions_opened().await;
        let viewer = scene.viewer();
        let flood = Flood::start(16, move |nth| {
            let viewer = viewer.clone();
            // Some expire before their statement is sent, and others during it.
            let deadline = Duration::from_micros(300 * (nth as u64 % 20 + 1));
            async move {
                let request = ListIssuesRequest { filter: format!("reporter = member {nth}"), ..Default::default() };
                viewer.issues().list_issues(with_deadline(request, deadline)).await.map(drop)
            }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        eventually("there were many calls", async || flood.begun() > 300).await;
        flood.stop(&["Ok", "DeadlineExceeded", "Cancelled", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
        let opened = scene.sessions_opened().await - before;
        assert!(opened <= SESSIONS_MAX, "{opened} sessions were opened");
    })
    .await;
}

#[tokio::test]
async fn slow_lists_with_deadlines_of_5_ms_do_not_hurt_others_or_open_database_sessions() {
    const SESSIONS_MAX: i64 = 10;
    Scene::run(async |scene| {
        scene.make_lists_slow().await;
        let before = scene.sessions_opened().await;
        let viewer = scene.viewer();
        let flood = Flood::start(16, move |nth| {
            let viewer = viewer.clone();
            async move {
                let (filter, page_size) = ("priority = critical".to_owned(), 1 + (nth % 1_000) as i32);
                let request = ListIssuesRequest { filter, page_size, ..Default::default() };
                viewer.issues().list_issues(with_deadline(request, Duration::from_millis(5))).await.map(drop)
            }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        eventually("there were many calls", async || flood.begun() > 1_000).await;
        flood.stop(&["DeadlineExceeded", "Cancelled", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
        let opened = scene.sessions_opened().await - before;
        assert!(opened <= SESSIONS_MAX, "{opened} sessions were opened");
    })
    .await;
}

#[tokio::test]
async fn calls_without_the_role_in_a_loop_do_not_hurt_others() {
    Scene::run(async |scene| {
        let (viewer, id) = (scene.viewer(), scene.others[0].issue_id.clone());
        let flood = Flood::start(16, move |_| {
            let (mut issues, id) = (viewer.issues(), id.clone());
            let issue = Issue { id, title: "forbidden".into(), ..Issue::default() };
            async move {
                for _ in 0..20 {
                    let update = UpdateIssueRequest { issue: Some(issue.clone()), ..Default::default() };
                    let status = issues.update_issue(ordinary(update)).await.unwrap_err();
                    if status.code() != Code::PermissionDenied {
                        return Err(status);
                    }
                }
                Ok(())
            }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        flood.stop(&["Ok", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn refused_calls_in_a_loop_do_not_hurt_others() {
    Scene::run(async |scene| {
        scene.make_lists_slow().await;
        // These hold all slots of the viewer.
        let viewer = scene.viewer();
        let holders = Flood::start(REQUESTS_OF_ONE as u32, move |nth| {
            let viewer = viewer.clone();
            async move { list(&viewer, "slow", nth).await }
        });
        let holders = holders.await;
        let (viewer, id) = (scene.viewer(), scene.others[0].issue_id.clone());
        let flood = Flood::start(16, move |_| {
            let (mut issues, id) = (viewer.issues(), id.clone());
            async move {
                let mut last = Ok(());
                for _ in 0..20 {
                    last = issues.get_issue(GetIssueRequest { id: id.clone(), ..Default::default() }).await.map(drop);
                }
                last
            }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        flood.stop(&["Ok", "ResourceExhausted"]).await;
        holders.stop(&["Ok", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn invalid_filters_of_the_maximum_length_do_not_hurt_others() {
    Scene::run(async |scene| {
        let viewer = scene.viewer();
        let flood = Flood::start(40, move |nth| {
            let viewer = viewer.clone();
            let filter = format!("{nth} {}", "(\"\\".repeat(660));
            async move { list(&viewer, &filter, nth).await }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        flood.stop(&["InvalidArgument", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn many_connections_of_one_viewer_do_not_hurt_others() {
    Scene::run(async |scene| {
        let (abuser, token) = (scene.abuser.clone(), scene.tracker.viewer.token.clone());
        let flood = Flood::start(10, move |_| {
            let client = abuser.client(&token);
            async move { client.auth().who_am_i(WhoAmIRequest {}).await.map(drop) }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        flood.stop(&["Ok", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}
