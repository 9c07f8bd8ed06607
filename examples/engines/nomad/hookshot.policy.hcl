# SPDX-License-Identifier: MPL-2.0
# What hookshot may do in Nomad: submit, read and list the jobs of one namespace ("job inspect" finds a job in the list).
# Nomad has no right for a single job, so give the jobs that hookshot deploys a namespace of their own and put its name
# here.
namespace "default" {
  capabilities = ["submit-job", "read-job", "list-jobs"]
}
