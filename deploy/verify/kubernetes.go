package main

import (
	"errors"
	"fmt"
	"reflect"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// verifyKubernetes builds the kustomization in dir as kubectl kustomize does and
// prints it. It fails unless every object has only fields that Kubernetes knows,
// and every pod meets the Pod Security Standard "restricted".
func verifyKubernetes(dir string) error {
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		return err
	}
	text, err := built.AsYaml()
	if err != nil {
		return err
	}
	fmt.Printf("%s---\n", text)
	strict := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, json.SerializerOptions{Strict: true})
	var problems []error
	for _, resource := range built.Resources() {
		text, err := resource.MarshalJSON()
		if err != nil {
			return err
		}
		object, _, err := strict.Decode(text, nil, nil)
		if err == nil {
			err = checkPod(object)
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("%s %s: %w", resource.GetKind(), resource.GetName(), err))
		}
	}
	return errors.Join(problems...)
}

// checkPod checks the pods that an object makes, if it makes any.
func checkPod(object runtime.Object) error {
	spec := reflect.ValueOf(object).Elem().FieldByName("Spec")
	if !spec.IsValid() || !spec.FieldByName("Template").IsValid() {
		return nil
	}
	template := spec.FieldByName("Template").Interface().(corev1.PodTemplateSpec)
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		return err
	}
	restricted := api.LevelVersion{Level: api.LevelRestricted, Version: api.LatestVersion()}
	result := policy.AggregateCheckResults(evaluator.EvaluatePod(restricted, &metav1.ObjectMeta{}, &template.Spec))
	if !result.Allowed {
		return fmt.Errorf("not restricted: %s", result.ForbiddenDetail())
	}
	return nil
}
