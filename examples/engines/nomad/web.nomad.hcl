# SPDX-License-Identifier: MPL-2.0
# The job that is deployed to. The image has no default: whoever runs it says which one.
variable "image" {
  type = string
}

job "web" {
  datacenters = ["*"]
  type        = "service"

  group "web" {
    count = 2

    # One allocation at a time; a new one counts once its check has passed for 10 s.
    update {
      max_parallel      = 1
      health_check      = "checks"
      min_healthy_time  = "10s"
      healthy_deadline  = "2m"
      progress_deadline = "5m"
      auto_revert       = true
    }

    network {
      port "http" {
        static = 8000
      }
    }

    service {
      name     = "web"
      port     = "http"
      provider = "consul"

      check {
        type     = "http"
        path     = "/health"
        interval = "5s"
        timeout  = "2s"
      }
    }

    task "web" {
      driver = "docker"

      config {
        image    = var.image
        ports    = ["http"]
        cap_drop = ["all"]
      }

      resources {
        cpu    = 200
        memory = 256
      }
    }
  }
}
