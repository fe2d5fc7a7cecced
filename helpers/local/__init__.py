"""A local Vertex AI, Cloud Storage and BigQuery for the unmodified SDKs: see README.md in this folder.

Only `helpers.environment` opens this door; nothing else in the course knows that it is there.
"""

PROJECT = "local-project"
PROJECT_NUMBER = "123456789012"
TENANT_PROJECT = "local-tenant-tp"  # of Google's, in which jobs run: what a job finds if it is told no project
MANAGED_BUCKET = "caip-tenant-local"  # where Vertex AI keeps its copies of models; users do not see it in their lists
