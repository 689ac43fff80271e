//! `ReportService`.

use tonic::Request;

use super::{Api, RpcResult};
use crate::{
    auth::Caller,
    db::reports,
    pb::{
        GetResolutionLatencyRequest, GetResolutionLatencyResponse, GetTopAssigneesRequest, GetTopAssigneesResponse,
        IssueScope, report_service_server::ReportService,
    },
    request::Check,
};

const ASSIGNEES_DEFAULT: i64 = 5;
const ASSIGNEES_MAX: i64 = 100;

#[tonic::async_trait]
impl ReportService for Api {
    async fn get_top_assignees(&self, request: Request<GetTopAssigneesRequest>) -> RpcResult<GetTopAssigneesResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let limit = match i64::from(request.limit) {
            negative @ ..0 => {
                check.fail("limit", format!("{negative} is negative; expected 0 to {ASSIGNEES_MAX}"));
                0
            }
            0 => ASSIGNEES_DEFAULT,
            limit => limit.min(ASSIGNEES_MAX),
        };
        let window = check.window(request.start_time, request.end_time);
        let scope: IssueScope = check.enumeration("scope", request.scope);
        check.done()?;

        let db = self.db.for_flow(caller.flow());
        let db = db.heavy_conn().await?;
        Ok(reports::top_assignees(&db, limit, window, scope != IssueScope::All).await?.into())
    }

    async fn get_resolution_latency(
        &self,
        request: Request<GetResolutionLatencyRequest>,
    ) -> RpcResult<GetResolutionLatencyResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let window = check.window(request.start_time, request.end_time);
        let group_by = check.enumeration("group_by", request.group_by);
        check.done()?;

        let db = self.db.for_flow(caller.flow());
        let db = db.heavy_conn().await?;
        let groups = reports::resolution_latency(&db, window, group_by).await?;
        Ok(GetResolutionLatencyResponse { groups }.into())
    }
}
