// A plain CPU call of the family in one crossing of the boundary per direction: arguments, kernels and autograd.
//
// Compiled against one torch and one Python, unlike the other libraries, and optional: whatever is not plain, or wrong,
// falls through to mlkernels/softmax.py, which says what is wrong. What a loss computes is decided there, too: a call
// of a kind that was not seen before is resolved by Python (mlkernels/fast_path.py) and remembered here.
#include <ATen/SavedTensorHooks.h>
#include <ATen/SequenceNumber.h>
#include <ATen/record_function.h>

#include <typeinfo>

#include "fast_path/node.h"

namespace mlkernels {
namespace {

// Below this many logits a call is over before another Python thread would have begun.
constexpr int64_t UNLOCK_FROM = 1 << 15;

// What a profiler shows of mlkernels/autograd.py and of the operators.
void record(at::RecordFunction& guard, const char* name, const Arguments& of) {
  if (!guard.isActive()) return;
  const std::vector<c10::IValue> inputs{of.input, of.target};
  at::detail::record_function_with_scope(guard, name, inputs, int64_t(at::sequence_number::peek()));
}

// Undefined: the call was refused, and Python says why.
Tensor run(const Call& call, const Arguments& of, std::vector<Tensor>& stats) {
  std::vector<Tensor> params;
  params.reserve(size_t(__builtin_popcountll(uint64_t(of.key.mask))));
  for (int slot = 0; slot < SLOTS; ++slot)
    if (of.key.mask >> slot & 1) params.push_back(of.by_slot[size_t(slot)]);
  const Handles handles(*call, of.input, of.target, params);
  AtenTensorOpaque* loss;
  std::array<AtenTensorOpaque*, SLOTS + 3> made;
  const bool at_once = call->needs && !call->apart, later = call->needs && call->apart;
  const bool rows = call->linear && (later || call->stats);
  const int count = at_once ? __builtin_popcountll(uint64_t(call->needs)) : call->linear && !rows ? 0 : 1;
  std::array<AtenTensorOpaque*, 6> described;
  const bool one = call->needs == int64_t(1) << INPUT;
  {
    at::RecordFunction function(at::RecordScope::FUNCTION), kernels(at::RecordScope::FUNCTION);
    if (call->needs || call->linear)
      record(function, call->linear ? "_LinearLoss" : at_once ? "_LossWithGradients" : "_SoftmaxLoss", of);
    record(kernels,
           rows           ? "mlkernels::linear_rows"
           : call->linear ? "mlkernels::linear_loss_with_gradients"
           : !at_once     ? "mlkernels::softmax_loss"
           : one          ? "mlkernels::softmax_loss_with_gradient"
                          : "mlkernels::softmax_loss_with_gradients",
           of);
    const bool unlocked = of.target.numel() * of.classes >= UNLOCK_FROM;
    const DirectLinear linear = linear_of(*call, of.weight, of.bias);
    PyThreadState* const state = unlocked ? PyEval_SaveThread() : nullptr;
    const bool good =
        rows ? direct->linear_rows(handles.call, linear, &loss, made.data(), call->stats ? described.data() : nullptr)
        : call->linear ? direct->linear_loss_with_gradients(handles.call, linear, call->needs, &loss, made.data())
        : at_once      ? direct->loss_with_gradients(handles.call, call->needs, &loss, made.data())
                       : direct->loss(handles.call, later, &loss, made.data());
    if (unlocked) PyEval_RestoreThread(state);
    if (!good) return Tensor();
  }
  Tensor result = taken(loss);
  std::vector<Tensor> kept;
  kept.reserve(size_t(count));
  for (int i = 0; i < count; ++i) kept.push_back(taken(made[size_t(i)]));
  for (size_t i = 0; call->stats && i < described.size(); ++i) stats.push_back(taken(described[i]));
  return call->needs ? with_history(call, of, params, std::move(result), stats, std::move(kept)) : result;
}

// (spec, values, input, target, group, common): the loss, or None where the call is not plain.
PyObject* loss(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 6, "six arguments");
  if (!unwatched() || !at::SavedTensorDefaultHooks::get_tls_state().stack.empty()) Py_RETURN_NONE;
  Arguments of;
  if (!of.read(arguments)) Py_RETURN_NONE;
  if (of.key.needs && (of.input.is_inference() || of.target.is_inference())) Py_RETURN_NONE;
  Call& place = calls[of.key.hash() % calls.size()];
  Call call = place;
  if (!call || !(call->key == of.key)) place = call = ask_python(of.key, arguments);
  if (!call->call) Py_RETURN_NONE;
  std::vector<Tensor> stats;
  const Tensor result = run(call, of, stats);
  if (!result.defined()) Py_RETURN_NONE;
  if (call->stats) {
    THPObjectPtr rows(THPVariable_WrapList(stats));
    if (!rows) throw python_error();
    THPObjectPtr done(PyObject_CallFunctionObjArgs(take_stats, arguments[2], rows.get(), nullptr));
    if (!done) throw python_error();
  }
  return THPVariable_Wrap(result);
  END_HANDLE_TH_ERRORS
}

// (type, attribute, method, backward): linear heads are served from now on.
PyObject* serve_linear(PyObject*, PyObject* arguments) {
  PyObject *type, *name, *method, *left;
  if (!PyArg_ParseTuple(arguments, LINEAR, &type, &name, &method, &left)) return nullptr;
  Py_INCREF(arguments);  // and all that it holds, for ever
  linear_type = type;
  plain_name = name;
  take_stats = method;
  linear_backward = left;
  Py_RETURN_NONE;
}

// (address of mlkernels_cpu_direct's result, defaults by name, reductions, describe, resolve, backward)
PyObject* set_up(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  unsigned long long address;
  PyObject *common, *given_reductions;
  if (!PyArg_ParseTuple(arguments, SET_UP, &address, &PyDict_Type, &common, &PyTuple_Type, &given_reductions, &describe,
                        &resolve, &backward))
    return nullptr;
  Py_INCREF(arguments);  // and all that it holds, for ever
  direct = reinterpret_cast<const Direct*>(address);
  TORCH_CHECK(std::strcmp(direct->numbering, NUMBERING) == 0 && direct->size == sizeof(Direct) &&
                  std::strcmp(direct->schemas, SCHEMAS) == 0,
              "the two libraries were built from different sources");
  Py_ssize_t known = 0;
  for (size_t i = 0; i < OPTIONS; ++i) {
    PyObject* const name = PyUnicode_InternFromString(i < EXTRA ? OTHERS[i] : EXTRAS[i - EXTRA].name);
    defaults[i] = Py_XNewRef(PyDict_GetItem(common, name));
    names[i] = defaults[i] ? name : nullptr;
    known += names[i] != nullptr;
  }
  TORCH_CHECK(known == PyDict_GET_SIZE(common) && PyTuple_GET_SIZE(given_reductions) == Py_ssize_t(reductions.size()),
              "other arguments than those of mlkernels/call.py");
  for (size_t i = 0; i < reductions.size(); ++i) reductions[i] = PyTuple_GET_ITEM(given_reductions, Py_ssize_t(i));
  cpu = PyUnicode_InternFromString("cpu");
  {
    const c10::InferenceMode off(false);
    ordinary = at::detail::empty_cpu({0}, at::kFloat).unsafeGetTensorImpl()->key_set();
  }
  {
    const c10::InferenceMode on;
    ordinary_inference = at::detail::empty_cpu({0}, at::kFloat).unsafeGetTensorImpl()->key_set();
  }
  using namespace torch::autograd;
  static PyGetSetDef properties[] = {THP_FUNCTION_DEFAULT_PROPERTIES,
                                     {"saved_tensors", saved_tensors, nullptr, nullptr, nullptr},
                                     {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyTypeObject made, later, linear;
  torch::autograd::registerCppFunction(
      typeid(GradientsOfLinear),
      torch::autograd::_initFunctionPyTypeObject(linear, "_LinearLossBackward", properties, nullptr));
  torch::autograd::registerCppFunction(
      typeid(GradientsMade),
      torch::autograd::_initFunctionPyTypeObject(made, "_LossWithGradientsBackward", properties, nullptr));
  torch::autograd::registerCppFunction(typeid(GradientsLater), torch::autograd::_initFunctionPyTypeObject(
                                                                   later, "_SoftmaxLossBackward", properties, nullptr));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(loss)), METH_FASTCALL, nullptr},
    {"set_up", set_up, METH_VARARGS, nullptr},
    {"serve_linear", serve_linear, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module{PyModuleDef_HEAD_INIT, "_fast_path", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace mlkernels

PyMODINIT_FUNC PyInit__fast_path() { return PyModule_Create(&mlkernels::module); }
