// The module tokenpool_ext._C: loading it registers the ops; its functions say what was built and what would be done,
// and look at values.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/api.h"
#include "cpu/interrupt.h"
#include "planner.h"
#include "planner_cuda.h"
#include "values.h"

namespace py = pybind11;

namespace {
PyObject* interruption = nullptr;  // what a signal's handler raised inside a call

bool signalled() {
  if (!Py_IsInitialized()) return false;
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return false;
  PyObject *type, *traceback;
  PyErr_Fetch(&type, &interruption, &traceback);
  PyErr_NormalizeException(&type, &interruption, &traceback);
  Py_XDECREF(type);
  Py_XDECREF(traceback);
  return true;
}
}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels, op schemas and introspection of tokenpool_ext";
  tokenpool::interrupt_check = signalled;
  m.def(
      "take_interruption",
      [] {
        return interruption ? py::reinterpret_steal<py::object>(std::exchange(interruption, nullptr)) : py::none();
      },
      "The exception (KeyboardInterrupt) for which a call stopped, once, or None.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["built"] = __DATE__ " " __TIME__;
        info["torch_target"] = "2.11";
        info["cpu_isa"] = std::string(tokenpool::kernels().name);
        return info;
      },
      "What was compiled, and which instruction set the CPU kernels use here.");
  m.def(
      "any_negative",
      [](uintptr_t values, int64_t count, int bytes) {
        return bytes == 8 ? tokenpool::any_negative<double>(values, count)
                          : tokenpool::any_negative<float>(values, count);
      },
      py::arg("values"), py::arg("count"), py::arg("bytes"),
      "Is one of the float32 or float64 numbers at this address below 0?");
  m.def("extremes", &tokenpool::extremes, py::arg("values"), py::arg("count"),
        "The least and the largest of the int64 at this address.");
  m.def("fill_strided", &tokenpool::fill_strided, py::arg("indices"), py::arg("images"), py::arg("tokens"),
        py::arg("clusters"), "Writes evenly spaced token indices, (images, clusters) int64, to this address.");
  m.def("fill_largest", &tokenpool::fill_largest, py::arg("indices"), py::arg("scores"), py::arg("images"),
        py::arg("tokens"), py::arg("clusters"),
        "Writes the indices of the largest of (images, tokens) float32 scores, (images, clusters) int64.");
  m.def(
      "plan_cpu",
      [](int64_t tokens, int64_t clusters, int64_t features, int64_t iterations, int acc_bytes, bool centers_given,
         bool farthest, bool medoids) {
        tokenpool::CpuProblem problem;
        problem.tokens = tokens;
        problem.clusters = clusters;
        problem.features = features;
        problem.iterations = iterations;
        problem.acc_bytes = acc_bytes;
        problem.centers_given = centers_given;
        problem.farthest = farthest;
        problem.medoids = medoids;
        const tokenpool::CpuPlan plan = tokenpool::plan_cpu(problem);
        py::dict result;
        result["path"] = plan.gram ? "gram" : plan.center_group == 1 ? "direct" : "streamed";
        result["flops"] = plan.flops;
        result["workspace_bytes"] = plan.workspace_bytes;
        result["gram_ns"] = plan.gram_ns;
        result["direct_ns"] = plan.direct_ns;
        result["reason"] = tokenpool::reason(problem, plan);
        return result;
      },
      py::arg("tokens"), py::arg("clusters"), py::arg("features"), py::arg("iterations"), py::arg("acc_bytes") = 4,
      py::arg("centers_given") = false, py::arg("farthest") = false, py::arg("medoids") = false,
      "How the CPU backend would compute one image, and why.");
  m.def(
      "plan_cuda",
      [](int64_t batch, int tokens, int clusters, int features, int iterations, int dtype, bool medoids, int major,
         int minor, int sm_count, size_t shared_limit, bool centers_given, bool farthest, int force_path) {
        tokenpool::cuda::CudaProblem problem;
        problem.batch = batch;
        problem.tokens = tokens;
        problem.features = features;
        problem.clusters = clusters;
        problem.iterations = iterations;
        problem.dtype = static_cast<tokenpool::cuda::DType>(dtype);
        problem.with_medoids = medoids;
        problem.major = major;
        problem.minor = minor;
        problem.sm_count = sm_count;
        problem.shared_limit = shared_limit;
        problem.init_is_centers = centers_given;
        problem.farthest = farthest;
        problem.force_path = force_path;
        const tokenpool::cuda::CudaPlan plan = tokenpool::cuda::plan_cuda(problem);
        py::dict result;
        result["path"] = std::string(tokenpool::cuda::path_name(plan.path));
        result["launches"] = plan.launches * plan.passes;
        result["threads"] = plan.threads;
        result["shared_bytes"] = plan.shared_bytes;
        result["blocks"] = plan.blocks;
        result["workspace_bytes"] = plan.workspace_bytes;
        result["flops"] = plan.flops;
        result["bytes"] = plan.bytes;
        result["reason"] = tokenpool::cuda::reason(problem, plan);
        return result;
      },
      py::arg("batch"), py::arg("tokens"), py::arg("clusters"), py::arg("features"), py::arg("iterations"),
      py::arg("dtype") = 0, py::arg("medoids") = false, py::arg("major") = 8, py::arg("minor") = 0,
      py::arg("sm_count") = 0, py::arg("shared_limit") = 0, py::arg("centers_given") = false,
      py::arg("farthest") = false, py::arg("force_path") = -1,
      "How the CUDA backend would compute a batch on a GPU of this compute capability, and why.");
}
