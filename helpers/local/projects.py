"""Projects, of Resource Manager: the SDK asks for the number of a project, and for the id that a number belongs to."""

from google.cloud import resourcemanager_v3
from google.iam.v1.iam_policy_pb2 import TestIamPermissionsResponse
from google.protobuf.message import Message

from helpers.local import PROJECT, PROJECT_NUMBER, errors
from helpers.local.service import Service

Project = resourcemanager_v3.Project.pb()


class Projects(Service):
    """The one project that there is."""

    name = "Projects"

    def get_project(self, request: Message) -> Message:
        """Return the project."""
        if request.name != f"projects/{PROJECT_NUMBER}":
            raise errors.not_found(request.name)
        return Project(name=request.name, project_id=PROJECT, display_name=PROJECT, state=Project.State.ACTIVE)

    def test_iam_permissions(self, request: Message) -> Message:
        """Return those of some permissions that the caller has in the project: all but the missing ones."""
        project = request.resource.removeprefix("projects/")
        if project not in (PROJECT, PROJECT_NUMBER):
            raise errors.other_project(project)
        missing = self.cloud.refusals.read().get("missing_permissions", ())
        return TestIamPermissionsResponse(permissions=[name for name in request.permissions if name not in missing])
