"""Projects, of Resource Manager: the SDK asks for the number of a project, and for the id that a number belongs to."""

from google.cloud import resourcemanager_v3
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
